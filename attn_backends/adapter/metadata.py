"""vLLM's per-batch metadata builder: the rows of a KV group, and the step's plan for its layers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)

from attn_backends.adapter.config import method_config
from attn_backends.adapter.counters import RowCounters
from attn_backends.adapter.entries import SplitEngine
from attn_backends.adapter.ops import engine_and_our_ops, op_context
from attn_backends.adapter.planning import (
    StepPlanner,
    attention_layers,
    group_geometry,
    shared_planner,
)
from attn_backends.adapter.rows import (
    RowKinds,
    is_prefilling,
    kinds_by_order,
    kinds_by_tokens,
    query_positions,
)
from attn_backends.batch import PagedBatch
from attn_backends.config import ConfigError
from attn_backends.layer_step import LayerStep, StepBatch, ops_of
from attn_backends.method import SparseMethod
from attn_backends.ops.resolution import Ops
from attn_backends.plan import DENSE_LAYER, NO_LAYERS, LayerPlan, StepPlan
from attn_backends.warm_up import Limits, WarmLayer, warm_up

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import AttentionSpec

logger = logging.getLogger("vllm.vllm_ext")


@dataclass
class ExtMetadata(AttentionMetadata):
    """What the layers of one KV group share in one step.

    Attributes:
        batch: the rows, with the group's block table.
        layers: plans by the engine's layer name; dropped layers have none.
        plan: of the step, for all groups.
        ops: of layers without and with a token rule, which not every kernel has.
        block_table: of all rows, ``[num_reqs, max_blocks]``.
        split: of layers whose heads have caches of their own.
    """

    batch: StepBatch
    layers: Mapping[str, LayerPlan]
    plan: StepPlan
    ops: tuple[Ops, Ops]
    block_table: torch.Tensor
    split: SplitEngine

    def step_of(
        self, name: str, views: tuple[torch.Tensor, torch.Tensor], scale: float
    ) -> LayerStep:
        """What a layer does.

        Args:
            name: of the layer.
            views: of its cache.
            scale: of its scores.
        """
        plan = self.layers[name]
        return LayerStep(plan, self.batch, ops_of(plan, self.ops), views, scale)


class ExtMetadataBuilder(AttentionMetadataBuilder[ExtMetadata]):
    """Rows and plan of a batch: no per-layer work, no host synchronisation.

    Decode rows are reordered to the front by vLLM (``reorder_batch_threshold``). A CUDA graph may
    be replayed for every batch of single tokens that it was captured as large for: all that
    differs between such batches is data in buffers that stay (docs/adr/0003). Where sparse rows
    only draft, batches are verified, of as many tokens for each row.
    """

    METHOD: ClassVar[SparseMethod]
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
        layers = attention_layers(vllm_config)
        if config.strict:
            _require_our_layers(layers, method)
        # Entries of single heads are never called: their builder says where blocks lie, no more.
        self._layer_of = {name: extract_layer_index(name) for name in layer_names if name in layers}
        sample = layers[next(iter(self._layer_of), next(iter(layers)))]
        geometry = group_geometry(vllm_config, sample, kv_cache_spec)
        schedule = method.schedule(config, geometry)
        self._max_model_len = geometry.max_model_len
        owner = next(iter(layers.values()))
        self._planner = shared_planner(
            owner,
            geometry,
            schedule,
            lambda is_first: StepPlanner(
                method.make_selector(config, schedule, geometry, device),
                schedule,
                _counters(vllm_config, method) if is_first else None,
                SplitEngine(geometry, vllm_config.scheduler_config.max_num_batched_tokens),
            ),
        )
        if not self._layer_of:
            self._planner.split.add_group(layer_names)
        # Of as many heads as the spec: one, where heads have caches of their own.
        num_query_heads = sample.num_heads // sample.num_kv_heads * kv_cache_spec.num_kv_heads
        plain, ruled = (
            engine_and_our_ops(
                op_context(
                    kv_cache_spec,
                    num_query_heads,
                    device,
                    spans,
                    rows_differ=schedule.prompts_see_everything,
                ),
                config.kernel,
            )
            for spans in ((), schedule.rules.values())
        )
        self._ops, self._layers = (plain, ruled), layers
        # Where sparse rows only draft, steps of the scheduler verify: they read everything.
        self._verifies = config.draft_tokens > 0
        self._dense_plan = StepPlan(dict.fromkeys(self._layer_of.values(), DENSE_LAYER), ())
        logger.info("%s: block %d tokens; %s; %s", method.name, geometry.block_size, ruled, config)

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: AttentionSpec
    ) -> AttentionCGSupport:
        """See ``AttentionMetadataBuilder.get_cudagraph_support``."""
        if method_config(vllm_config, cls.METHOD).draft_tokens:
            return AttentionCGSupport.UNIFORM_BATCH
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> ExtMetadata:
        """See ``AttentionMetadataBuilder.build``."""
        common = common_attn_metadata
        if self._verifies:
            self._planner.count_verified(~is_prefilling(common))
            return self._metadata(common, self._dense_plan, 0)
        kinds = kinds_by_order if self.device.type == "cpu" else kinds_by_tokens
        rows = kinds(common)
        return self._metadata(common, self._plan(common, rows), rows.num_decodes)

    def build_for_drafting(
        self, common_attn_metadata: CommonAttentionMetadata, draft_index: int
    ) -> ExtMetadata:
        """See ``AttentionMetadataBuilder.build_for_drafting``: rows of one token each, whose
        lengths are known on the host.
        """
        common = common_attn_metadata
        plan = self._planner.plan(
            self,
            common.seq_lens,
            common.seq_lens_cpu_upper_bound,
            common.num_reqs,
            places=common.req_idx,
            draft_index=draft_index,
        )
        return self._metadata(common, plan, common.num_reqs)

    def _metadata(
        self, common: CommonAttentionMetadata, plan: StepPlan, num_decodes: int
    ) -> ExtMetadata:
        """The step's plan on this group's block table; the first rows are decode rows."""
        batch = PagedBatch(
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            num_reqs=common.num_reqs,
            num_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            max_seq_len=common.max_seq_len,
        )
        layers = {
            name: plan.layers[index]
            for name, index in self._layer_of.items()
            if index in plan.layers
        }
        step = StepBatch.split(batch, num_decodes, self._max_model_len).cut(plan.cuts)
        split = self._planner.split
        return ExtMetadata(step, layers, plan, self._ops, batch.block_table, split)

    def warm_up(self, block_tables: Mapping[str, torch.Tensor], limits: Limits) -> None:
        """Runs every op of the group's layers; caches are bound. See ``warm_up.warm_up``.

        Args:
            block_tables: of every KV group, by the name of each layer or entry in it.
            limits: of the engine.
        """
        names = [name for name in self._layer_of if not self._layers[name].impl.is_dropped]
        served = {self._layer_of[name]: self._warm_layer(self._layers[name]) for name in names}
        if not served:
            return
        split = self._planner.split
        has_heads = any(layer.places is not None for layer in served.values())
        heads = split.warm_heads(block_tables) if has_heads else None
        warm_up(self._planner.selector, served, block_tables[names[0]], limits, heads)

    def _warm_layer(self, layer: Any) -> WarmLayer:
        sizes = layer.num_heads, layer.impl.scale
        if not layer.impl.is_split:
            return WarmLayer(self._ops, layer.impl.cache_views(layer.kv_cache), *sizes)
        cache = layer.impl.split_cache(layer.kv_cache, self._planner.split)
        return WarmLayer(self._ops, cache.views, *sizes, cache.places)

    def _plan(self, common: CommonAttentionMetadata, rows: RowKinds) -> StepPlan:
        if not self._layer_of:
            return NO_LAYERS
        lengths = common.seq_lens_cpu_upper_bound  # exact without speculative decoding
        queries: list[range] = []
        first = rows.num_decodes
        if self._planner.follows_prompts and lengths is not None and first < common.num_reqs:
            queries = query_positions(common.query_start_loc_cpu[first:], lengths[first:])
        return self._planner.plan(
            self,
            common.seq_lens[: rows.num_decodes],
            None if lengths is None else lengths[: rows.num_decodes],
            common.num_reqs,
            rows.prompt_rows,
            common.req_idx,
            queries,
        )


def _counters(vllm_config: VllmConfig, method: SparseMethod) -> RowCounters | None:
    """Every rank serves the same rows: one of them counts."""
    parallel = vllm_config.parallel_config
    return RowCounters(method.name, parallel.data_parallel_index) if parallel.rank == 0 else None


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
