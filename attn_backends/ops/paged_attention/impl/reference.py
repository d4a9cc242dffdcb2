"""Oracle of ``paged_attention``: gather, mask, softmax, one row at a time, in fp32."""

from __future__ import annotations

import torch

from attn_backends.batch import PagedBatch, SpanRule
from attn_backends.ops.dispatch import OpContext


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
    num_kv_heads, block_size = key_cache.shape[1:3]
    group = query.shape[1] // num_kv_heads
    starts = batch.query_start_loc.tolist()
    for row in range(batch.num_reqs):
        first, last = starts[row], starts[row + 1]
        if first == last:
            continue
        seq_len = int(batch.seq_lens[row])
        table = batch.block_table[row, : -(-seq_len // block_size)].long()
        positions = torch.arange(seq_len - (last - first), seq_len, device=query.device)
        tokens = torch.arange(seq_len, device=query.device)
        for head in range(num_kv_heads):
            visible = (tokens <= positions[:, None])[None]  # [1 or num_spans, query_len, seq_len]
            if rule is not None:
                visible = visible & rule.sees(row, head, positions[:, None], tokens)
            seen = visible.any(dim=1).any(dim=0)
            keys = key_cache[table, head].flatten(0, 1)[:seq_len].float()
            values = value_cache[table, head].flatten(0, 1)[:seq_len].float()
            # Hidden tokens may hold anything: 0 * NaN is NaN, so they are cleared.
            keys = torch.where(seen[:, None], keys, 0.0)
            values = torch.where(seen[:, None], values, 0.0)
            heads = slice(head * group, (head + 1) * group)
            logits = torch.einsum("qgd,td->gqt", query[first:last, heads].float(), keys) * scale
            weights = logits.masked_fill(~visible, -torch.inf).softmax(dim=-1)
            out[first:last, heads] = torch.einsum("gqt,td->qgd", weights, values).to(out.dtype)


def unsupported_reason(context: OpContext) -> str | None:
    """Works everywhere."""
    return None
