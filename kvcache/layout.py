"""Geometry of the paged KV cache.

vLLM hands every attention layer one tensor of shape
``[num_blocks, num_kv_heads, block_size, 2 * head_size]``. What the bytes of one
(block, head) tile mean is the backend's business; two orders occur:

``KEY_TRANSPOSED`` (CPU)
    the first half of the tile is the key block stored ``[head_size, block_size]``,
    the second half the value block stored ``[block_size, head_size]``. A dot product
    of a query with all keys of a block then runs along contiguous memory. vLLM's CPU
    kernels use the same order for their "vec" and "vec16" instruction sets (measured,
    docs/adr/0002), so both can read one cache.
``FUSED`` (GPU)
    row ``t`` of the tile is ``key[t] ++ value[t]``.

Nothing in this module copies data: both orders are exposed as strided views with the
same logical shape, so that a reference implementation is written once.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch


class KVOrder(Enum):
    """Order of the elements inside one (block, head) tile."""

    KEY_TRANSPOSED = "key_transposed"
    FUSED = "fused"


@dataclass(frozen=True)
class PagedKVLayout:
    """Shape and element order of one layer's paged KV cache.

    Raises:
        ValueError: a size is not positive.
    """

    num_blocks: int
    block_size: int  # tokens per block
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype
    order: KVOrder

    def __post_init__(self) -> None:
        for field in ("num_blocks", "block_size", "num_kv_heads", "head_size"):
            value = getattr(self, field)
            if value <= 0:
                raise ValueError(f"PagedKVLayout.{field} must be positive, got {value}")

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the tensor vLLM allocates."""
        return (self.num_blocks, self.num_kv_heads, self.block_size, 2 * self.head_size)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, keys and values of all KV heads."""
        return self.num_kv_heads * self.block_size * 2 * self.head_size * self.dtype.itemsize


def kv_views(kv_cache: torch.Tensor, order: KVOrder) -> tuple[torch.Tensor, torch.Tensor]:
    """Logical key and value views of a cache tensor, sharing its memory.

    Args:
        kv_cache: ``[num_blocks, num_kv_heads, block_size, 2 * head_size]``. For
            ``KEY_TRANSPOSED`` each (block, head) tile must be contiguous.
        order: element order inside a tile.

    Returns:
        ``key_cache, value_cache``, both ``[num_blocks, num_kv_heads, block_size,
        head_size]``; writing to a view writes to the cache.

    Raises:
        ValueError: the tile of a ``KEY_TRANSPOSED`` cache is not contiguous.
    """
    num_blocks, num_kv_heads, block_size, double_head = kv_cache.shape
    head_size = double_head // 2
    if order is KVOrder.FUSED:
        return kv_cache[..., :head_size], kv_cache[..., head_size:]
    if kv_cache.stride(3) != 1 or kv_cache.stride(2) != double_head:
        raise ValueError(
            "KEY_TRANSPOSED needs contiguous (block, head) tiles; got strides "
            f"{tuple(kv_cache.stride())} for shape {tuple(kv_cache.shape)}"
        )
    tile_strides = (kv_cache.stride(0), kv_cache.stride(1))
    shape = (num_blocks, num_kv_heads, block_size, head_size)
    start = kv_cache.storage_offset()
    key = kv_cache.as_strided(shape, (*tile_strides, 1, block_size), start)
    value = kv_cache.as_strided(
        shape, (*tile_strides, head_size, 1), start + block_size * head_size
    )
    return key, value
