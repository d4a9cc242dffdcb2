"""Resolution of the ops for one KV geometry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from attn_backends.ops.anchor_decode import api as anchor_decode
from attn_backends.ops.block_topk import api as block_topk
from attn_backends.ops.cache_write import api as cache_write
from attn_backends.ops.dense_decode import api as dense_decode
from attn_backends.ops.dispatch import OpContext, OpImpl, resolve
from attn_backends.ops.paged_attention import api as paged_attention
from attn_backends.ops.sparse_decode import api as sparse_decode
from kvcache.layout import KVOrder

ORDER_OF_DEVICE = {"cpu": KVOrder.KEY_TRANSPOSED, "cuda": KVOrder.FUSED}


@dataclass(frozen=True)
class Ops:
    """The implementations in use; a layer never dispatches."""

    cache_write: OpImpl
    paged_attention: OpImpl
    sparse_decode: OpImpl
    anchor_decode: OpImpl
    block_topk: OpImpl
    dense_decode: OpImpl

    def __str__(self) -> str:
        """Which implementation serves which op, for logs."""
        return " ".join(f"{field.name}={getattr(self, field.name).name}" for field in fields(self))


def resolve_ops(context: OpContext, kernel: str, others: Sequence[OpImpl] = ()) -> Ops:
    """The ops for ``context``.

    Args:
        context: what must be served.
        kernel: an implementation's name, or ``auto``.
        others: implementations that are not this package's (the engine's own).

    Raises:
        ConfigError: an op has no implementation that fits.
    """
    modules = (
        cache_write,
        paged_attention,
        sparse_decode,
        anchor_decode,
        block_topk,
        dense_decode,
    )
    return Ops(
        *(
            resolve(
                [*(impl for impl in others if impl.op == name), *module.implementations()],
                context,
                kernel,
            )
            for name, module in zip((field.name for field in fields(Ops)), modules, strict=True)
        )
    )
