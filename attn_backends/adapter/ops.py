"""Resolution of the ops for one KV geometry; done once, shared by builder and layers."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields

from attn_backends.adapter import engine_ops
from attn_backends.ops.anchor_decode import api as anchor_decode
from attn_backends.ops.block_topk import api as block_topk
from attn_backends.ops.cache_write import api as cache_write
from attn_backends.ops.dispatch import OpContext, OpImpl, resolve
from attn_backends.ops.paged_attention import api as paged_attention
from attn_backends.ops.sparse_decode import api as sparse_decode
from kvcache.layout import KVOrder

ORDER_OF_DEVICE = {"cpu": KVOrder.KEY_TRANSPOSED, "cuda": KVOrder.FUSED}


@dataclass(frozen=True)
class Ops:
    """The implementations in use; ``forward`` never dispatches."""

    cache_write: OpImpl
    paged_attention: OpImpl
    sparse_decode: OpImpl
    anchor_decode: OpImpl
    block_topk: OpImpl

    def __str__(self) -> str:
        """Which implementation serves which op, for logs."""
        return " ".join(f"{field.name}={getattr(self, field.name).name}" for field in fields(self))


@functools.cache
def resolve_ops(context: OpContext, kernel: str) -> Ops:
    """The ops for ``context``.

    Raises:
        ConfigError: an op has no implementation that fits.
    """
    attention_impls = [engine_ops.paged_attention(), *paged_attention.implementations()]
    return Ops(
        cache_write=resolve(cache_write.implementations(), context, kernel),
        paged_attention=resolve(attention_impls, context, kernel),
        sparse_decode=resolve(sparse_decode.implementations(), context, kernel),
        anchor_decode=resolve(anchor_decode.implementations(), context, kernel),
        block_topk=resolve(block_topk.implementations(), context, kernel),
    )
