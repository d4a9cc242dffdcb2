"""A profile for FLUX, made by hand: what its tests serve."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from attn_backends.methods.flux import METHOD, FluxSection
from tests.profiles import write_section

SINK_TOKENS, WINDOW_TOKENS = 40, 128


def write_profile(
    path: Path,
    num_layers: int,
    num_kv_heads: int,
    full_layers: Sequence[int],
    window_tokens: int = WINDOW_TOKENS,
) -> str:
    """Layers that read everything, and one window for the others.

    Args:
        path: of the file.
        num_layers: of the model.
        num_kv_heads: of each layer.
        full_layers: these.
        window_tokens: of the others, behind the prompt.

    Returns:
        The path, as settings take it.
    """
    section = FluxSection(
        full_layers=list(full_layers), sink_tokens=SINK_TOKENS, window_tokens=window_tokens
    )
    return write_section(path, METHOD.name, section, num_layers, num_kv_heads)
