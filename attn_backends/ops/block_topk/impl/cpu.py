"""``block_topk`` in C++ (attn_backends/native/kernels.cpp)."""

from __future__ import annotations

import torch

from attn_backends.batch import BlockSelection
from attn_backends.ops.native_support import unsupported_reason

__all__ = ["run", "unsupported_reason"]


def run(
    block_mass: torch.Tensor,
    seq_lens: torch.Tensor,
    block_size: int,
    budget_blocks: torch.Tensor,
    sink_blocks: int,
    recent_blocks: int,
    out: BlockSelection,
) -> None:
    """See ``api.py``."""
    torch.ops.vllm_ext.block_topk(
        block_mass,
        seq_lens,
        block_size,
        budget_blocks,
        sink_blocks,
        recent_blocks,
        out.logical_blocks,
        out.counts,
    )
