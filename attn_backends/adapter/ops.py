"""Resolution of the ops with the engine's own among them; shared by builder and layers."""

from __future__ import annotations

import functools

from attn_backends.adapter import engine_ops
from attn_backends.ops.dispatch import OpContext
from attn_backends.ops.resolution import Ops, resolve_ops


@functools.cache
def engine_and_our_ops(context: OpContext, kernel: str) -> Ops:
    """See ``resolve_ops``; once for each geometry."""
    return resolve_ops(context, kernel, [engine_ops.paged_attention()])
