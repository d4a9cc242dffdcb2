"""Oracle of ``block_topk``: sort by an explicit key, one row and head at a time."""

from __future__ import annotations

import torch

from attn_backends.batch import BlockSelection
from attn_backends.ops.dispatch import OpContext


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
    out.logical_blocks.fill_(-1)
    for row, seq_len in enumerate(seq_lens.tolist()):
        num_blocks = -(-seq_len // block_size)
        count = min(num_blocks, max(int(budget_blocks[row]), 1))
        for head in range(block_mass.shape[1]):
            mass = block_mass[row, head].tolist()

            def preference(
                block: int, num_blocks: int = num_blocks, mass: list[float] = mass
            ) -> tuple[int, float, int]:
                if block == num_blocks - 1:
                    return (3, 0.0, block)
                if block >= num_blocks - recent_blocks:
                    return (2, 0.0, block)
                if block < sink_blocks:
                    return (1, 0.0, -block)
                return (0, mass[block], block)

            best = sorted(range(num_blocks), key=preference, reverse=True)[:count]
            out.logical_blocks[row, head, :count] = torch.tensor(sorted(best), dtype=torch.int32)
            out.counts[row, head] = count


def unsupported_reason(context: OpContext) -> str | None:
    """Works everywhere."""
    return None
