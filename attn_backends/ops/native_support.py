"""When the C++ kernels can serve; the same answer for every op they implement."""

from __future__ import annotations

from attn_backends import native
from attn_backends.ops.dispatch import OpContext
from kvcache.layout import KVOrder

_LANES = 16  # widest vector of fp32 the kernels are compiled for


def unsupported_reason(context: OpContext) -> str | None:
    """None when the kernels can serve ``context``, else a short reason."""
    layout = context.layout
    if context.device_type != "cpu":
        return "CPU only"
    if layout.order is not KVOrder.KEY_TRANSPOSED:
        return "needs the KEY_TRANSPOSED cache order"
    for field in ("block_size", "head_size"):
        if getattr(layout, field) % _LANES:
            return f"{field} {getattr(layout, field)} is not a multiple of {_LANES}"
    return native.unavailable_reason()
