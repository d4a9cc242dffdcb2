"""Blocks of decode rows that read their first tokens and their last, and nothing in between."""

from __future__ import annotations

import torch


class GappedRows:
    """Sinks, and what is seen from some token on.

    Args:
        sink_blocks: int32, of any shape that goes with the rows'; whole blocks.
        block_size: tokens of a KV block.
        width: the most blocks that a row reads.
        device: of the buffers.
    """

    def __init__(
        self, sink_blocks: torch.Tensor, block_size: int, width: int, device: torch.device
    ) -> None:
        self._sink_blocks, self._block_size = sink_blocks, block_size
        self._steps = torch.arange(width, dtype=torch.int32, device=device)
        self._is_sink = self._steps < sink_blocks[..., None]

    def blocks(
        self, seq_lens: torch.Tensor, first_seen: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What is read, in ascending order.

        Args:
            seq_lens: of the rows.
            first_seen: the first token, sinks apart, that each reads; 0 for everything.

        Returns:
            Logical blocks ``[..., width]``, -1 behind the last, and how many they are.
        """
        # Blocks that lie between sinks and tail; 0 where the two touch or overlap.
        gap = (first_seen // self._block_size - self._sink_blocks).clamp_min(0)
        counts = (seq_lens + self._block_size - 1) // self._block_size - gap
        logical = self._steps + gap[..., None].masked_fill(self._is_sink, 0)
        return logical.masked_fill_(self._steps >= counts[..., None], -1), counts
