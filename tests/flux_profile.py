"""A profile for FLUX, made by hand: what its tests serve."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save

from attn_backends.methods.flux import METHOD, FluxSection
from tests.profiles import write_section

SINK_TOKENS, WINDOW_TOKENS = 40, 128
ROUTER_FILE = "router.safetensors"


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


def write_routed_profile(
    path: Path,
    full_layers: Sequence[int],
    groups: Sequence[Sequence[int]],
    router: dict[str, torch.Tensor],
) -> str:
    """Layers that are always full, groups that routers decide about, and a window for the others.

    Args:
        path: of the profile; the routers lie beside it.
        full_layers: these.
        groups: nested, in this order.
        router: tensors of the file, ``weights`` of the shape of groups, layers and KV heads.

    Returns:
        The path, as settings take it.
    """
    content = save(router)
    (path.parent / ROUTER_FILE).write_bytes(content)
    section = FluxSection(
        full_layers=list(full_layers),
        routed_groups=[list(group) for group in groups],
        sink_tokens=SINK_TOKENS,
        window_tokens=WINDOW_TOKENS,
        router_file=ROUTER_FILE,
        router_sha256=hashlib.sha256(content).hexdigest(),
    )
    _, num_layers, num_kv_heads = router["weights"].shape
    return write_section(path, METHOD.name, section, num_layers, num_kv_heads)
