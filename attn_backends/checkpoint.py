"""A checkpoint as a folder: its configuration, and which one it is."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from attn_backends.config import ConfigError, read_text

MAX_CONFIG_BYTES = 4 << 20
_SAMPLE_BYTES = 1 << 18
_SHAPE_KEYS = (
    "architectures",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


def read_model_config(model_folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a Hugging Face folder.

    Raises:
        ConfigError: it cannot be read, or is not a JSON object.
    """
    path = model_folder / "config.json"
    text = read_text(path, MAX_CONFIG_BYTES, named=str(path))
    try:
        config: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path} is not a JSON object; is this a Hugging Face folder?")
    return config


def fingerprint(model_folder: Path) -> str:
    """Identifies a checkpoint by its shape and samples of its weight files.

    Weight files are sampled at both ends (256 KiB each) instead of read whole, so that
    a large model costs milliseconds.

    Args:
        model_folder: a Hugging Face folder with ``config.json``.

    Raises:
        ConfigError: see ``read_model_config``.
    """
    config = read_model_config(model_folder)
    digest = hashlib.sha256(json.dumps([config.get(key) for key in _SHAPE_KEYS]).encode())
    for path in sorted(model_folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLE_BYTES))
            file.seek(max(0, size - _SAMPLE_BYTES))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
