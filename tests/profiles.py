"""What a profile may say to each method that reads one, for a model of six layers of two KV heads.

A new method with a ``profile_section`` gets its section here; tests that take every method read it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from attn_backends.profile import SCHEMA_VERSION, Profile, ProfileSection

NUM_LAYERS, NUM_KV_HEADS = 6, 2
SECTIONS: dict[str, dict[str, Any]] = {
    "TIDAL_DECODE": {
        "dense_layers": [0],
        "anchor_layers": [1],
        "head_maps": {"2": [1, 0]},
        "drop_layers": [3],
    },
    "SINK_WINDOW": {"full_layers": [0], "full_heads": {"2": [1]}, "drop_layers": [3]},
    "FLUX": {"full_layers": [1, 4], "sink_tokens": 40, "window_tokens": 128},
    "MOA": {
        "sink_tokens": 40,
        "floor_tokens": 128,
        "classes": [[0, 64], [200, 0], [-64, 24]],  # full heads, a window, and one that grows
        "class_of_head": [[0, 1], [1, 2], [2, 0], [0, 1], [1, 2], [2, 0]],
    },
}
HEADER = {
    "fingerprint": "0" * 64,
    "model": "m",
    "num_layers": NUM_LAYERS,
    "num_kv_heads": NUM_KV_HEADS,
    "calibration": {},
}
PROFILE = HEADER | {"schema_version": 2, "methods": SECTIONS, "files": {"a.json": "0" * 64}}


def write_profile(path: Path) -> str:
    """All sections.

    Args:
        path: of the file.

    Returns:
        The path, as settings take it.
    """
    path.write_text(json.dumps(PROFILE))
    return str(path)


def write_section(
    path: Path, method: str, section: ProfileSection, num_layers: int, num_kv_heads: int
) -> str:
    """One method's, for a model of this shape; arguments and result as above."""
    shape = {"num_layers": num_layers, "num_kv_heads": num_kv_heads}
    profile = Profile(**(HEADER | shape | {"schema_version": SCHEMA_VERSION}))
    path.write_text(profile.with_section(method, section).model_dump_json())
    return str(path)
