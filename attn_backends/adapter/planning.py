"""One plan per step for all KV groups of an engine.

vLLM makes a metadata builder for every group of layers with the same KV cache, and splits even
layers of one kind into several groups; an anchor and the layers that reuse its selection may
then have different builders. What an anchor writes must be what they read, so the builders share
a planner, whose selector owns the buffers. That is sound because all groups serve the same rows
in the same order, logical block indices are valid in each, and every builder of a step has run
before the first layer does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.kv_cache_interface import AttentionSpec

from attn_backends.adapter.config import chosen_method, geometry_of, method_config
from attn_backends.adapter.counters import RowCounters
from attn_backends.adapter.entries import SplitEngine, shared_head_tables
from attn_backends.adapter.requests import BOOK
from attn_backends.config import ConfigError
from attn_backends.head_classes import num_groups
from attn_backends.head_tables import HeadTables
from attn_backends.method import Geometry, Selector, StepRows
from attn_backends.plan import NO_LAYERS, LayerSchedule, StepPlan
from kvcache.adapter.specs import policies_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheSpec

Shape = tuple[int, int]  # KV heads and tokens per block: what layers that share a plan agree in


class StepPlanner:
    """Plans each step once, and counts its rows.

    Args:
        selector: of the method.
        schedule: of the layers.
        counters: None where another planner or rank counts the same rows.
        split: of the same layers.
    """

    def __init__(
        self,
        selector: Selector,
        schedule: LayerSchedule,
        counters: RowCounters | None,
        split: SplitEngine,
    ) -> None:
        self.split = split
        self.selector = selector
        self._narrows_decode_only = schedule.narrows_decode_only
        self.follows_prompts = schedule.prompts_see_everything
        if self.follows_prompts:
            BOOK.follow_prompts()
        self._counters = counters
        self._ended = BOOK.ended_requests()
        self._served: set[int] = set()  # builders that have this step's plan
        self._plan = NO_LAYERS

    def forget_step(self) -> None:
        """A builder was made: whoever had the last step's plan may be gone."""
        self._served.clear()

    def plan(
        self,
        builder: object,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor | None,
        num_rows: int,
        prompt_rows: Sequence[int] = (),
        places: Sequence[int] | None = None,
        prefill_queries: Sequence[range] = (),
        draft_index: int | None = None,
    ) -> StepPlan:
        """The step's plan, made for the first builder that asks: each asks once per step.

        Args:
            builder: who asks.
            seq_lens: ``[num_decodes]`` int32, of the decode rows.
            seq_lens_cpu: the same on the host, if known.
            num_rows: decode and prefill rows.
            prompt_rows: of the decode rows, those of a single prompt token (rows.py).
            places: see ``RequestBook.ids_of_rows``.
            prefill_queries: see ``StepRows``; for planners that follow prompts.
            draft_index: see ``StepRows``; None where the rows are no drafts.
        """
        if not self._served or id(builder) in self._served:
            self._served.clear()
            ids = BOOK.ids_of_rows(num_rows if self.follows_prompts else len(seq_lens), places)
            dense_until: Sequence[int | None] = ()
            if self.follows_prompts:
                dense_until = BOOK.dense_until(ids, num_rows)
            self._plan = self.selector.plan(
                StepRows(
                    seq_lens,
                    seq_lens_cpu,
                    num_rows,
                    ids,
                    BOOK.of_rows(ids[: len(seq_lens)]),
                    self._ended.take(),
                    prompt_rows,
                    dense_until,
                    prefill_queries,
                    draft_index or 0,
                )
            )
            if draft_index is None:
                self._count(set(prompt_rows))
            elif draft_index == 0:
                self._count_drafts()
        self._served.add(id(builder))
        return self._plan

    def take_routes(self) -> dict[str, int]:
        """Routes that nobody was told of yet, of prompts that the last step ended; counted."""
        prompts = self._plan.prompts
        if prompts is None:
            return {}
        routes = prompts.take_news()
        if self._counters is not None:
            self._counters.add_routes(prompts.take_counts())
        return routes

    def count_verified(self, is_decoding: torch.Tensor) -> None:
        """Rows of a step that read everything, since what is sparse are drafts.

        Args:
            is_decoding: ``[num_reqs]`` bool on the host, rows that do not read their prompt;
                padding and batches that are nobody's are not counted.
        """
        if self._counters is not None:
            self._counters.add_verified(int(is_decoding[: BOOK.num_rows].sum()))

    def _count_drafts(self) -> None:
        """Once for all drafts of a step."""
        if self._counters is None:
            return
        reasons = self._plan.reasons[: BOOK.num_rows]
        drafts = bool(self._plan.narrowed_rows)
        rows = Counter(reason.value for reason in reasons)
        undrafted = Counter({("none", reason): count for (_, reason), count in rows.items()})
        self._counters.add_drafted(rows if drafts else undrafted)

    def _count(self, prompt_rows: Collection[int]) -> None:
        """Rows of requests alone, and not those that still read their prompt."""
        if self._counters is None:
            return
        reasons = enumerate(self._plan.reasons[: BOOK.num_rows])
        rows = Counter(reason.value for row, reason in reasons if row not in prompt_rows)
        # A step of a beam is a prompt to vLLM, so that none of its rows is a decode row: where
        # prefill is dense, a beam search is.
        path = "dense" if self._narrows_decode_only else "sparse"
        rows[path, "beam_search"] = BOOK.take_beam_steps()
        self._counters.add(rows)
        if self._plan.watch is not None:
            self._counters.show_recall(self._plan.watch)


def group_geometry(vllm_config: VllmConfig, sample: Attention, spec: AttentionSpec) -> Geometry:
    """What a selector must know of layers that share a KV cache.

    Args:
        vllm_config: of the engine.
        sample: one of the layers; any layer where the group is of single heads.
        spec: of the group's KV cache.
    """
    return replace(
        geometry_of(vllm_config),
        num_kv_heads=sample.num_kv_heads,
        num_query_heads=sample.num_heads,
        head_size=spec.head_size,
        block_size=spec.block_size,
    )


def selectors_of(
    vllm_config: VllmConfig, specs: Mapping[str, KVCacheSpec], device: torch.device
) -> list[Selector]:
    """Selectors as the engine's builders will make them, with buffers of the same size.

    Args:
        vllm_config: names the method and its settings; its layers are constructed.
        specs: of the KV cache, by layer.
        device: of the buffers.
    """
    method = chosen_method(vllm_config)
    if method is None:
        return []
    config, layers = method_config(vllm_config, method), attention_layers(vllm_config)
    geometries = {
        group_geometry(vllm_config, layers.get(name, next(iter(layers.values()))), spec)
        for name, spec in specs.items()
        if isinstance(spec, AttentionSpec)
    }
    return [
        method.make_selector(config, method.schedule(config, geometry), geometry, device)
        for geometry in geometries
    ]


def head_tables_of(
    vllm_config: VllmConfig, specs: Mapping[str, KVCacheSpec], device: torch.device
) -> HeadTables | None:
    """What split layers will share (``SplitEngine``), with buffers of the same size; None where no
    layer is split.

    Args:
        vllm_config: of the engine; its layers are constructed.
        specs: of the KV cache, by layer or entry.
        device: of the buffers.
    """
    layers = attention_layers(vllm_config)
    entries = {
        name: spec
        for name, spec in specs.items()
        if isinstance(spec, AttentionSpec) and name not in layers
    }
    if not entries:
        return None
    sample, spec = next(iter(layers.values())), next(iter(entries.values()))
    return shared_head_tables(
        group_geometry(vllm_config, sample, spec),
        num_groups([*Counter(policies_of(entries).values()).values()]),
        tile_stride=1,
        max_num_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
        device=device,
    )


def attention_layers(vllm_config: VllmConfig) -> dict[str, Attention]:
    """The engine's attention layers by name."""
    return get_layers_from_vllm_config(vllm_config, Attention)


# By an attention layer of the engine: it lives as long as the engine, and no two share one.
_PLANNERS: WeakKeyDictionary[torch.nn.Module, dict[Shape, StepPlanner]] = WeakKeyDictionary()


def take_routes(vllm_config: VllmConfig) -> dict[str, int]:
    """Routes that an engine decided since this was last asked, by request id."""
    if not BOOK.follows_prompts:  # nothing is routed; asked in every step
        return {}
    owner = next(iter(attention_layers(vllm_config).values()), None)
    planners = {} if owner is None else _PLANNERS.get(owner, {})
    return {name: route for one in planners.values() for name, route in one.take_routes().items()}


def shared_planner(
    owner: torch.nn.Module,
    geometry: Geometry,
    schedule: LayerSchedule,
    make: Callable[[bool], StepPlanner],
) -> StepPlanner:
    """The engine's planner for layers of this shape, made on first use.

    Args:
        owner: any module of the engine, the same one for all its builders.
        geometry: of the builder's layers.
        schedule: of all layers.
        make: makes a planner, told whether it is the engine's first one, which counts rows.

    Raises:
        ConfigError: layers of another shape cannot share a selection.
    """
    planners = _PLANNERS.setdefault(owner, {})
    here = (geometry.num_kv_heads, geometry.block_size)
    if schedule.shares_selections and planners and here not in planners:
        there = next(iter(planners))
        raise ConfigError(
            f"layers of {here[0]} and of {there[0]} KV heads, with KV blocks of {here[1]} and of "
            f"{there[1]} tokens, cannot share a selection of blocks; choose an --attention-backend "
            "whose layers each read their own (vllm-ext methods)"
        )
    if here not in planners:
        planners[here] = make(not planners)
    planners[here].forget_step()
    return planners[here]
