"""vLLM's per-batch metadata builder: turns a batch into a ``DecodePlan``."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from attn_backends.adapter.config import geometry_of, method_config
from attn_backends.adapter.counters import RowCounters
from attn_backends.adapter.ops import engine_and_our_ops, op_context
from attn_backends.adapter.requests import BOOK
from attn_backends.adapter.sharing import shared_selector
from attn_backends.adapter.windows import WindowPlans
from attn_backends.batch import PagedBatch, RowOptions
from attn_backends.config import ConfigError
from attn_backends.method import SELECTING, SparseMethod
from attn_backends.ops.resolution import Ops
from attn_backends.plan import SELECTING_ROLES, DecodePlan, KeptRows, LayerRole, RowSubset

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import AttentionSpec

logger = logging.getLogger("vllm.vllm_ext")


@dataclass
class ExtMetadata(AttentionMetadata):
    """What the layers of one KV group share in one step."""

    plan: DecodePlan
    ops: Ops
    windowed: dict[str, DecodePlan]  # of layers with a window of their own, by name
    window_ops: Ops  # they need the token rule, which not every kernel has

    def of_layer(self, name: str) -> tuple[DecodePlan, Ops]:
        """The plan of one layer, and the ops that serve it."""
        plan = self.windowed.get(name)
        return (self.plan, self.ops) if plan is None else (plan, self.window_ops)


class ExtMetadataBuilder(AttentionMetadataBuilder[ExtMetadata]):
    """One plan per batch: no per-layer work, no host synchronisation.

    Decode rows are reordered to the front by vLLM (``reorder_batch_threshold``).
    CUDA graphs are off until a test on a GPU shows them right (docs/adr/0003).
    """

    METHOD: ClassVar[SparseMethod]
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER
    reorder_batch_threshold: int | None = 1

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        method = self.METHOD
        config = method_config(vllm_config, method)
        layers = get_layers_from_vllm_config(vllm_config, Attention)
        if config.strict:
            _require_our_layers(layers, method)
        # The spec knows this group's KV heads and blocks better than the model's config.
        geometry = replace(
            geometry_of(vllm_config),
            num_kv_heads=kv_cache_spec.num_kv_heads,
            num_query_heads=layers[layer_names[0]].num_heads,
            head_size=kv_cache_spec.head_size,
            block_size=kv_cache_spec.block_size,
        )
        schedule = method.schedule(config, geometry)
        indices = {name: extract_layer_index(name) for name in layer_names}
        self._roles = {name: schedule.roles[index] for name, index in indices.items()}
        self._head_maps = {
            name: torch.tensor(schedule.head_maps[index], device=device)
            for name, index in indices.items()
            if index in schedule.head_maps
        }
        anchors = [i for i, role in enumerate(schedule.roles) if role in SELECTING_ROLES]
        inheriting = anchors[1:] if LayerRole.REUSE in schedule.roles else []
        self._inheriting = frozenset(n for n, i in indices.items() if i in inheriting)
        self._selector = (
            shared_selector(
                next(iter(layers.values())),
                geometry,
                lambda: method.make_selector(config, geometry, device),
            )
            if LayerRole.REUSE in schedule.roles
            else method.make_selector(config, geometry, device)
        )
        if self._selector.keeper is not None:
            for name, role in self._roles.items():
                if role in SELECTING_ROLES:
                    self._selector.keeper.add_layer(name)
        windows = {
            name: schedule.windows[i] for name, i in indices.items() if i in schedule.windows
        }
        self._windows = WindowPlans(windows, geometry, device)
        has_rule = self._selector.span_rule(1) is not None
        self._ops, self._window_ops = (
            engine_and_our_ops(
                op_context(kv_cache_spec, geometry.num_query_heads, device, with_rule),
                config.kernel,
            )
            for with_rule in (has_rule, has_rule or bool(windows))
        )
        # Every rank and every KV group serves the same rows: one of them counts.
        is_first = min(indices.values()) == min(extract_layer_index(name) for name in layers)
        parallel = vllm_config.parallel_config
        is_counting = is_first and parallel.rank == 0
        engine = parallel.data_parallel_index
        self._counters = RowCounters(method.name, engine) if is_counting else None
        # Prefill reads what decode would leave out, all of it.
        self._prefills_densely = not schedule.windows and bool(
            {LayerRole.REUSE, LayerRole.SELF} & {*schedule.roles}
        )
        self._ended = BOOK.ended_requests()
        logger.info(
            "%s: block %d tokens; %s; %s", method.name, geometry.block_size, self._ops, config
        )

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> ExtMetadata:
        """See ``AttentionMetadataBuilder.build``."""
        common = common_attn_metadata
        # A last prompt token on its own (a prefix hit, a chunk) is prefill too: what it writes may
        # serve others through the prefix cache. vLLM puts such rows behind the decode rows.
        num_decodes, num_prefills, num_decode_tokens, _ = split_decodes_and_prefills(
            common, treat_short_extends_as_decodes=common.is_prefilling is None
        )
        self._count_beam_steps()
        options = self._options(num_decodes)
        batch = PagedBatch(
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            num_reqs=common.num_reqs,
            num_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            max_seq_len=common.max_seq_len,
        )
        prefill = prefill_rule = None
        if num_prefills:
            prefill = batch.rows(num_decodes, batch.num_reqs, num_decode_tokens, batch.num_tokens)
            prefill_rule = self._selector.span_rule(num_prefills)
        plan = DecodePlan(
            num_tokens=batch.num_tokens,
            num_decode_tokens=num_decode_tokens,
            decode=None,
            prefill=prefill,
            selection=None,
            anchor=None,
            decode_rule=None,
            prefill_rule=prefill_rule,
            decodes_densely=False,
            roles=self._roles,
            head_maps=self._head_maps,
            inheriting=self._inheriting,
            selecting_rows=[],
            checked=None,
            kept=None,
        )
        if num_decodes:
            decode = batch.rows(0, num_decodes, 0, num_decode_tokens)
            plan = self._with_decode(plan, decode, common.seq_lens_cpu_upper_bound, options)
        return ExtMetadata(plan, self._ops, self._windows.of_step(plan), self._window_ops)

    def _with_decode(
        self,
        plan: DecodePlan,
        decode: PagedBatch,
        seq_lens_cpu: torch.Tensor | None,
        options: Mapping[int, RowOptions],
    ) -> DecodePlan:
        """The plan with its decode rows, which are counted and watched here."""
        num_rows = decode.num_reqs
        selection = self._selector.select(decode)
        if seq_lens_cpu is None:
            reasons = [("sparse", "unknown_length")] * num_rows
        else:
            reasons = self._selector.row_reasons(seq_lens_cpu[:num_rows], options)
        selecting_rows = [row for row, reason in enumerate(reasons) if reason in SELECTING]
        if self._counters is not None:
            self._counters.add(Counter(reasons))
        decodes_densely = all(path == "dense" for path, _ in reasons)
        due = slots = None
        if seq_lens_cpu is not None and not decodes_densely:
            due, slots = self._due(seq_lens_cpu[:num_rows].tolist(), reasons, options)
        return replace(
            plan,
            decode=decode,
            selection=selection,
            anchor=self._selector.anchor_state(decode, options),
            decode_rule=self._selector.span_rule(num_rows),
            decodes_densely=decodes_densely,
            selecting_rows=selecting_rows,
            checked=self._checked(decode, selecting_rows, due),
            kept=self._kept(decode, due, slots),
        )

    def _options(self, num_decodes: int) -> dict[int, RowOptions]:
        """What the rows' requests asked for, as far as the recall guard lets them.

        Called in every step, without decode rows too: requests that ended are forgotten here.
        """
        options = BOOK.of_rows(num_decodes)
        ended_ids = self._ended.take()
        watch, keeper = self._selector.watch, self._selector.keeper
        if watch is None:
            return options
        row_ids = BOOK.ids_of_rows(num_decodes)
        if watch.begin_step(BOOK.step, row_ids):
            watch.forget(ended_ids)
            if keeper is not None:
                keeper.forget(ended_ids)
            if self._counters is not None:
                self._counters.show_recall(watch)
        return watch.guarded(row_ids, options)

    def _count_beam_steps(self) -> None:
        """Each is a prompt to vLLM, so that none of its rows is a decode row: where prefill is
        dense, a beam search is.
        """
        if self._counters is not None and (num_steps := BOOK.take_beam_steps()):
            path = "dense" if self._prefills_densely else "sparse"
            self._counters.add({(path, "beam_search"): num_steps})

    def _due(
        self,
        seq_lens: list[int],
        reasons: list[tuple[str, str]],
        options: Mapping[int, RowOptions],
    ) -> tuple[list[int], list[int]] | tuple[None, None]:
        """Rows that select anew and the slots of all rows; None where all of them select."""
        keeper = self._selector.keeper
        row_ids = [name for name in BOOK.ids_of_rows(len(seq_lens)) if name is not None]
        if keeper is None or len(row_ids) != len(seq_lens):  # a dummy batch has no ids
            return None, None
        keys = [(reason, options.get(row)) for row, reason in enumerate(reasons)]
        return keeper.begin_step(BOOK.step, row_ids, seq_lens, keys)

    def _kept(
        self, decode: PagedBatch, due: list[int] | None, slots: list[int] | None
    ) -> KeptRows | None:
        keeper = self._selector.keeper
        if keeper is None or due is None or slots is None:
            return None
        indices = torch.tensor(slots, device=decode.seq_lens.device)
        return KeptRows(RowSubset.of(decode, due), indices, keeper.stores)

    def _checked(
        self, decode: PagedBatch, selecting_rows: list[int], due: list[int] | None
    ) -> RowSubset | None:
        watch = self._selector.watch
        if watch is None:
            return None
        row_ids = BOOK.ids_of_rows(decode.num_reqs)
        return RowSubset.of(decode, watch.expect(row_ids, selecting_rows, due))


def _require_our_layers(layers: dict[str, Attention], method: SparseMethod) -> None:
    foreign = {
        name: layer.get_attn_backend().get_name()
        for name, layer in layers.items()
        if layer.get_attn_backend().get_name() != method.name
    }
    if foreign:
        name, backend = next(iter(foreign.items()))
        raise ConfigError(
            f"{method.name} was asked for, but {len(foreign)} of {len(layers)} attention layers "
            f"use another backend (first: {name} uses {backend}); set vllm_ext.strict to false "
            "to accept that"
        )
