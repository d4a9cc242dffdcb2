"""Batches as a decode step has them."""

from __future__ import annotations

import torch

from attn_backends.batch import PagedBatch


def decode_batch(seq_lens: list[int], block_table: torch.Tensor | None = None) -> PagedBatch:
    """One query token per row.

    Args:
        seq_lens: tokens of each row, the current one included.
        block_table: of selections alone, which read no cache, it does not matter.
    """
    rows = len(seq_lens)
    if block_table is None:
        block_table = torch.zeros(rows, 256, dtype=torch.int32)
    return PagedBatch(
        query_start_loc=torch.arange(rows + 1, dtype=torch.int32),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        block_table=block_table,
        num_reqs=rows,
        num_tokens=rows,
        max_query_len=1,
        max_seq_len=max(seq_lens),
    )
