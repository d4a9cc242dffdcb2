"""Dense decode attention that also says where the attention mass lies, in one pass over K.

``run(query, key_cache, value_cache, batch, scale, out, block_mass) -> None``

query, out: ``[num_reqs, num_query_heads, head_size]``, contiguous per row; without ``out`` only
the masses are computed, and no value is read.
key_cache, value_cache: ``[num_blocks, num_kv_heads, block_size, head_size]`` strided views.
batch: ``PagedBatch`` with one query token per row; ``seq_lens`` includes it.
scale: factor on the logits.
block_mass: ``[num_reqs, num_kv_heads, max_blocks]`` fp32, contiguous, or None. Receives for
each logical block the softmax mass of its tokens, summed over the query heads of the group
(every head's masses sum to 1, so all heads have one vote); 0 past the row's last block.

The normalised sum is Kascade's (arXiv 2512.16391): taking the maximum over the group, or raw
logits as TidalDecode does per query head, lets one sharp head decide for all.
"""

from __future__ import annotations

from attn_backends.ops.dispatch import OpImpl


def implementations() -> list[OpImpl]:
    """All implementations that this package ships; nothing heavy is imported."""
    from attn_backends.ops.anchor_decode.impl import cpu, reference, triton

    return [
        OpImpl("anchor_decode", name, module.run, module.unsupported_reason)
        for name, module in (("cpu", cpu), ("triton", triton), ("reference", reference))
    ]
