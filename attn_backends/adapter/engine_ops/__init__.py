"""The engine's own kernels, offered to the dispatch as implementation ``engine``."""

from __future__ import annotations

from attn_backends.adapter.engine_ops import cpu, cuda
from attn_backends.ops.dispatch import OpImpl


def implementations(device_type: str) -> list[OpImpl]:
    """What the engine has for a device, ``cpu`` or ``cuda``; nothing heavy is imported."""
    return {"cpu": cpu, "cuda": cuda}[device_type].implementations()
