"""Decode attention (one query token per row) over a block selection.

``run(query, key_cache, value_cache, batch, selection, rule, scale, out) -> None``

query, out: ``[num_reqs, num_query_heads, head_size]``, contiguous per row.
key_cache, value_cache: ``[num_blocks, num_kv_heads, block_size, head_size]`` strided views.
batch: ``PagedBatch`` with one query token per row; ``seq_lens`` includes it.
selection: ``BlockSelection``; each KV head of each row reads its own blocks, or with
``selection.heads`` those of the head named there. Tokens at or past ``seq_lens`` are masked, in the
last block and in blocks that begin there: a selection may name those that later queries will read.
rule: ``SpanRule`` or None; trims tokens inside the selected blocks.
scale: factor on the logits.

A row without selected blocks (a padding row) gives zeros. Index tensors are contiguous in
their last dimension.
"""

from __future__ import annotations

from attn_backends.ops.dispatch import OpImpl


def implementations() -> list[OpImpl]:
    """All implementations that this package ships; nothing heavy is imported."""
    from attn_backends.ops.sparse_decode.impl import cpu, reference, triton

    return [
        OpImpl("sparse_decode", name, module.run, module.unsupported_reason)
        for name, module in (("cpu", cpu), ("triton", triton), ("reference", reference))
    ]
