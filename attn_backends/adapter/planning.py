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
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch

from attn_backends.adapter.counters import RowCounters
from attn_backends.adapter.entries import SplitEngine
from attn_backends.adapter.requests import BOOK
from attn_backends.config import ConfigError
from attn_backends.method import Geometry, Selector, StepRows
from attn_backends.plan import NO_LAYERS, LayerSchedule, StepPlan

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
        self._selector = selector
        self._narrows_decode_only = schedule.narrows_decode_only
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
    ) -> StepPlan:
        """The step's plan, made for the first builder that asks: each asks once per step.

        Args:
            builder: who asks.
            seq_lens: ``[num_decodes]`` int32, of the decode rows.
            seq_lens_cpu: the same on the host, if known.
            num_rows: decode and prefill rows.
        """
        if not self._served or id(builder) in self._served:
            self._served.clear()
            num_decodes = len(seq_lens)
            self._plan = self._selector.plan(
                StepRows(
                    seq_lens,
                    seq_lens_cpu,
                    num_rows,
                    BOOK.ids_of_rows(num_decodes),
                    BOOK.of_rows(num_decodes),
                    self._ended.take(),
                )
            )
            self._count()
        self._served.add(id(builder))
        return self._plan

    def _count(self) -> None:
        if self._counters is None:
            return
        rows = Counter(reason.value for reason in self._plan.reasons)
        # A step of a beam is a prompt to vLLM, so that none of its rows is a decode row: where
        # prefill is dense, a beam search is.
        path = "dense" if self._narrows_decode_only else "sparse"
        rows[path, "beam_search"] = BOOK.take_beam_steps()
        self._counters.add(rows)
        if self._plan.watch is not None:
            self._counters.show_recall(self._plan.watch)


# By an attention layer of the engine: it lives as long as the engine, and no two share one.
_PLANNERS: WeakKeyDictionary[torch.nn.Module, dict[Shape, StepPlanner]] = WeakKeyDictionary()


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
