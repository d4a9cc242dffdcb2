"""``sparse_decode`` in C++ (attn_backends/native/kernels.cpp)."""

from __future__ import annotations

import torch

from attn_backends.batch import BlockSelection, PagedBatch, SpanRule
from attn_backends.ops.native_support import unsupported_reason

__all__ = ["run", "unsupported_reason"]


def run(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    batch: PagedBatch,
    selection: BlockSelection,
    rule: SpanRule | None,
    scale: float,
    out: torch.Tensor,
) -> None:
    """See ``api.py``."""
    torch.ops.vllm_ext.sparse_decode(
        query,
        key_cache,
        value_cache,
        batch.block_table,
        batch.seq_lens,
        selection.logical_blocks,
        selection.counts,
        selection.heads,
        None if rule is None else rule.values,
        scale,
        out,
    )
