"""Scatter this step's keys and values into the paged cache.

``run(key, value, key_cache, value_cache, slot_mapping) -> None``

key, value: ``[num_tokens, num_kv_heads, head_size]``, contiguous in the last dimension.
key_cache, value_cache: ``[num_blocks, num_kv_heads, block_size, head_size]`` strided
views (``kvcache.layout.kv_views``) of the same dtype.
slot_mapping: ``[num_tokens]`` int64, ``physical_block * block_size + offset``; a negative
slot is padding and is skipped.

Pure data movement: implementations must agree bit for bit.
"""

from __future__ import annotations

from attn_backends.ops.dispatch import OpImpl


def implementations() -> list[OpImpl]:
    """All implementations that this package ships; nothing heavy is imported."""
    from attn_backends.ops.cache_write.impl import cpu, reference, triton

    return [
        OpImpl("cache_write", name, module.run, module.unsupported_reason)
        for name, module in (("cpu", cpu), ("triton", triton), ("reference", reference))
    ]
