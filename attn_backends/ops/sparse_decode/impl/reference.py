"""Oracle of ``sparse_decode``: gather the selected blocks, mask, softmax, in fp32."""

from __future__ import annotations

import torch

from attn_backends.batch import BlockSelection, PagedBatch, SpanRule
from attn_backends.ops.dispatch import OpContext


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
    num_kv_heads, block_size = key_cache.shape[1:3]
    group = query.shape[1] // num_kv_heads
    offsets = torch.arange(block_size, device=query.device)
    for row in range(batch.num_reqs):
        seq_len = int(batch.seq_lens[row])
        for head in range(num_kv_heads):
            source = head if selection.heads is None else int(selection.heads[head])
            count = int(selection.counts[row, source])
            logical_blocks = selection.logical_blocks[row, source, :count].long()
            physical_blocks = batch.block_table[row, logical_blocks].long()
            tokens = (logical_blocks[:, None] * block_size + offsets).flatten()
            visible = (tokens < seq_len)[None]  # [1 or num_spans, num_selected]
            if rule is not None:
                visible = visible & rule.sees(row, head, batch.seq_lens[row].long() - 1, tokens)
            seen = visible.any(dim=0)  # hidden tokens may hold anything
            keys = key_cache[physical_blocks, head].flatten(0, 1)[seen].float()
            values = value_cache[physical_blocks, head].flatten(0, 1)[seen].float()
            heads = slice(head * group, (head + 1) * group)
            logits = query[row, heads].float() @ keys.T * scale
            weights = logits.masked_fill(~visible[:, seen], -torch.inf).softmax(dim=-1)
            out[row, heads] = (weights @ values).to(out.dtype)


def unsupported_reason(context: OpContext) -> str | None:
    """Works everywhere."""
    return None
