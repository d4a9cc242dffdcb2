"""vLLM's CPU kernels."""

from __future__ import annotations

import platform

import torch

from attn_backends import native
from attn_backends.adapter.engine_ops.per_batch import PerBatch
from attn_backends.batch import PagedBatch, SpanRule
from attn_backends.ops.dispatch import OpContext, OpImpl
from kvcache.layout import KVOrder


class CpuPagedAttention:
    """vLLM's CPU attention op. Dense only: it has a window but no sinks, and no masks."""

    def __init__(self) -> None:
        self._metadata: PerBatch[torch.Tensor] = PerBatch()

    def run(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        batch: PagedBatch,
        rule: SpanRule | None,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        """See ``attn_backends/ops/paged_attention/api.py``; ``rule`` must be None."""
        from vllm import _custom_ops

        num_kv_heads, _, head_size = key_cache.shape[1:]
        metadata = self._metadata.get(
            batch,
            None,
            lambda: _custom_ops.cpu_attn_get_scheduler_metadata(
                num_reqs=batch.num_reqs,
                num_heads=query.shape[1],
                num_kv_heads=num_kv_heads,
                head_dim=head_size,
                seq_lens=batch.seq_lens,
                dtype=query.dtype,
                query_start_loc=batch.query_start_loc,
                causal=True,
                sliding_window_size=-1,
                isa="vec" if head_size % 32 == 0 else "vec16",
                enable_kv_split=True,
            ),
        )
        _custom_ops.cpu_attention_with_kv_cache(
            query=query,
            # The op takes both halves of a tile as [block_size, head_size].
            key_cache=key_cache.as_strided(value_cache.shape, value_cache.stride()),
            value_cache=value_cache,
            output=out,
            query_start_loc=batch.query_start_loc,
            seq_lens=batch.seq_lens,
            scale=scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=batch.block_table,
            softcap=0.0,
            scheduler_metadata=metadata,
            s_aux=None,
        )

    @staticmethod
    def unsupported_reason(context: OpContext) -> str | None:
        """See ``OpImpl``."""
        layout = context.layout
        if platform.machine() != "x86_64":
            return "offered on x86 CPUs only"
        if context.with_rule:
            return "has no sink blocks"
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        if layout.head_size not in CPUAttentionBackend.get_supported_head_sizes():
            return f"the engine's kernel does not take heads of {layout.head_size}"
        if layout.order is not KVOrder.KEY_TRANSPOSED or layout.block_size % 32:
            return "needs KEY_TRANSPOSED blocks of a multiple of 32 tokens"
        if _ours_is_faster(layout.dtype):
            return f"slower than ours for {layout.dtype} on this CPU"
        return None


def _ours_is_faster(dtype: torch.dtype) -> bool:
    """Measured (docs/measurements.md); where ours cannot be built, the engine's is faster."""
    is_vectorised = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    is_measured = dtype in (torch.float32, torch.bfloat16)
    return is_vectorised and is_measured and native.unavailable_reason() is None


def implementations() -> list[OpImpl]:
    """``paged_attention`` alone."""
    kernel = CpuPagedAttention()
    return [OpImpl("paged_attention", "engine", kernel.run, kernel.unsupported_reason)]
