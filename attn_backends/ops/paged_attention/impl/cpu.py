"""``paged_attention`` in C++ (attn_backends/native/kernels.cpp)."""

from __future__ import annotations

import torch

from attn_backends.batch import PagedBatch, SpanRule
from attn_backends.ops.native_support import unsupported_reason

__all__ = ["run", "unsupported_reason"]


def run(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    batch: PagedBatch,
    rule: SpanRule | None,
    scale: float,
    out: torch.Tensor,
) -> None:
    """See ``api.py``."""
    torch.ops.vllm_ext.paged_attention(
        query,
        key_cache,
        value_cache,
        batch.query_start_loc,
        batch.seq_lens,
        batch.block_table,
        None if rule is None else rule.values,
        scale,
        out,
    )
