"""vLLM's per-batch metadata builder: the rows of a KV group, and the step's plan for its layers."""

from __future__ import annotations

import logging
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
from attn_backends.adapter.entries import SplitEngine
from attn_backends.adapter.ops import engine_and_our_ops, op_context
from attn_backends.adapter.planning import StepPlanner, shared_planner
from attn_backends.batch import PagedBatch
from attn_backends.config import ConfigError
from attn_backends.layer_step import LayerStep, StepBatch
from attn_backends.method import SparseMethod
from attn_backends.ops.resolution import Ops
from attn_backends.plan import NO_LAYERS, LayerPlan, StepPlan

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
        return LayerStep(plan, self.batch, self.ops[plan.rule is not None], views, scale)


class ExtMetadataBuilder(AttentionMetadataBuilder[ExtMetadata]):
    """Rows and plan of a batch: no per-layer work, no host synchronisation.

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
        # Entries of single heads are never called: their builder says where blocks lie, no more.
        self._layer_of = {name: extract_layer_index(name) for name in layer_names if name in layers}
        sample = layers[next(iter(self._layer_of), next(iter(layers)))]
        geometry = replace(
            geometry_of(vllm_config),
            num_kv_heads=sample.num_kv_heads,
            num_query_heads=sample.num_heads,
            head_size=kv_cache_spec.head_size,
            block_size=kv_cache_spec.block_size,
        )
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
                op_context(kv_cache_spec, num_query_heads, device, spans), config.kernel
            )
            for spans in ((), schedule.spans.values())
        )
        self._ops = (plain, ruled)
        logger.info("%s: block %d tokens; %s; %s", method.name, geometry.block_size, ruled, config)

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
        num_decodes, *_ = split_decodes_and_prefills(
            common, treat_short_extends_as_decodes=common.is_prefilling is None
        )
        batch = PagedBatch(
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            num_reqs=common.num_reqs,
            num_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            max_seq_len=common.max_seq_len,
        )
        plan = self._plan(batch, num_decodes, common.seq_lens_cpu_upper_bound)
        layers = {
            name: plan.layers[index]
            for name, index in self._layer_of.items()
            if index in plan.layers
        }
        rows = StepBatch.split(batch, num_decodes, self._max_model_len)
        split = self._planner.split
        return ExtMetadata(rows, layers, plan, self._ops, batch.block_table, split)

    def _plan(
        self, batch: PagedBatch, num_decodes: int, seq_lens_cpu: torch.Tensor | None
    ) -> StepPlan:
        if not self._layer_of:
            return NO_LAYERS
        return self._planner.plan(
            self,
            batch.seq_lens[:num_decodes],
            None if seq_lens_cpu is None else seq_lens_cpu[:num_decodes],
            batch.num_reqs,
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
