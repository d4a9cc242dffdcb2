"""Attention of any number of query tokens per row over all kept blocks.

``run(query, key_cache, value_cache, batch, rule, scale, out) -> None``

query, out: ``[num_tokens, num_query_heads, head_size]``, contiguous per token.
key_cache, value_cache: ``[num_blocks, num_kv_heads, block_size, head_size]`` strided views.
batch: ``PagedBatch``; query tokens are the last tokens of their row, causal.
rule: ``SpanRule`` or None for plain causal attention. Tokens that the rule hides are
never read into the result, whatever their memory holds (freed blocks may hold NaN).
scale: factor on the logits.
"""

from __future__ import annotations

from attn_backends.ops.dispatch import OpImpl


def implementations() -> list[OpImpl]:
    """All implementations that this package ships; nothing heavy is imported."""
    from attn_backends.ops.paged_attention.impl import cpu, reference, triton

    return [
        OpImpl("paged_attention", name, module.run, module.unsupported_reason)
        for name, module in (("cpu", cpu), ("triton", triton), ("reference", reference))
    ]
