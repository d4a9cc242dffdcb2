"""Oracle of ``anchor_decode``: gather, softmax, sum by block, one row at a time, in fp32."""

from __future__ import annotations

import torch

from attn_backends.batch import PagedBatch
from attn_backends.ops.dispatch import OpContext


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
    num_kv_heads, block_size = key_cache.shape[1:3]
    group = query.shape[1] // num_kv_heads
    if block_mass is not None:
        block_mass[: batch.num_reqs].zero_()
    for row in range(batch.num_reqs):
        seq_len = int(batch.seq_lens[row])
        num_blocks = -(-seq_len // block_size)
        table = batch.block_table[row, :num_blocks].long()
        for head in range(num_kv_heads):
            keys = key_cache[table, head].flatten(0, 1)[:seq_len].float()
            heads = slice(head * group, (head + 1) * group)
            weights = (query[row, heads].float() @ keys.T * scale).softmax(dim=-1)
            if out is not None:
                values = value_cache[table, head].flatten(0, 1)[:seq_len].float()
                out[row, heads] = (weights @ values).to(out.dtype)
            if block_mass is not None:
                padding = num_blocks * block_size - seq_len
                padded = torch.nn.functional.pad(weights.sum(dim=0), (0, padding))
                block_mass[row, head, :num_blocks] = padded.view(num_blocks, block_size).sum(dim=1)


def unsupported_reason(context: OpContext) -> str | None:
    """Works everywhere."""
    return None
