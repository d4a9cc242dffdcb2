"""``anchor_decode`` in C++ (attn_backends/native/kernels.cpp)."""

from __future__ import annotations

import torch

from attn_backends.batch import PagedBatch
from attn_backends.ops.native_support import unsupported_reason

__all__ = ["run", "unsupported_reason"]


def run(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    batch: PagedBatch,
    scale: float,
    out: torch.Tensor | None,
    block_mass: torch.Tensor | None,
) -> None:
    """See ``api.py``."""
    torch.ops.vllm_ext.anchor_decode(
        query, key_cache, value_cache, batch.block_table, batch.seq_lens, scale, out, block_mass
    )
