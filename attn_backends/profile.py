"""Calibration profiles: one validated JSON file per checkpoint.

A profile says which layers attend densely, which are anchors, and which anchor head each KV
head of the other layers follows. ``vllm-ext profile`` writes it; profiles that this package
ships lie in ``attn_backends/profiles/`` and are found by the model's fingerprint.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from attn_backends.config import ConfigError
from attn_backends.plan import LayerRole, LayerSchedule

MAX_PROFILE_BYTES = 4 << 20
SHIPPED = Path(__file__).with_name("profiles")
_SAMPLE_BYTES = 1 << 18
_SHAPE_KEYS = (
    "architectures",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


class Profile(BaseModel):
    """The file's content; layers and heads are 0-based."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = Field(ge=1, le=1)
    fingerprint: str = Field(pattern=r"^[0-9a-f]{64}$")
    model: str = Field(max_length=200)
    num_layers: int = Field(ge=1, le=1024)
    num_kv_heads: int = Field(ge=1, le=1024)
    dense_layers: list[int]
    anchor_layers: list[int]
    head_maps: dict[int, list[int]]
    full_layers: list[int] = Field(default_factory=list)  # of SINK_WINDOW: keep and read all
    calibration: dict[str, Any]

    @model_validator(mode="after")
    def _layers_and_heads_exist(self) -> Profile:
        for field in ("dense_layers", "anchor_layers", "full_layers"):
            wrong = [layer for layer in getattr(self, field) if not 0 <= layer < self.num_layers]
            if wrong:
                raise ValueError(f"{field} has {wrong}; layers are 0 to {self.num_layers - 1}")
        if set(self.dense_layers) & set(self.anchor_layers):
            raise ValueError("a layer cannot be both dense and anchor")
        first_anchor = min(self.anchor_layers, default=self.num_layers)
        uncovered = [layer for layer in range(first_anchor) if layer not in self.dense_layers]
        if uncovered:
            raise ValueError(f"layers {uncovered} come before the first anchor and are not dense")
        for layer, heads in self.head_maps.items():
            if not 0 <= layer < self.num_layers:
                raise ValueError(f"head_maps has layer {layer} of {self.num_layers}")
            if len(heads) != self.num_kv_heads or not all(
                0 <= head < self.num_kv_heads for head in heads
            ):
                raise ValueError(
                    f"head_maps[{layer}] is {heads}; it needs {self.num_kv_heads} heads "
                    f"between 0 and {self.num_kv_heads - 1}"
                )
        return self

    def schedule(self) -> LayerSchedule:
        """Roles and head maps of the layers."""
        roles = tuple(
            LayerRole.DENSE
            if layer in self.dense_layers
            else LayerRole.ANCHOR
            if layer in self.anchor_layers
            else LayerRole.REUSE
            for layer in range(self.num_layers)
        )
        return LayerSchedule(roles, {layer: tuple(h) for layer, h in self.head_maps.items()})


def require_fit(profile: Profile, num_layers: int, num_kv_heads: int) -> None:
    """Refuses a profile of another shape.

    Raises:
        ConfigError: names both shapes.
    """
    if (profile.num_layers, profile.num_kv_heads) != (num_layers, num_kv_heads):
        raise ConfigError(
            f"profile for {profile.model} has {profile.num_layers} layers of "
            f"{profile.num_kv_heads} KV heads; this model has {num_layers} of {num_kv_heads} "
            "(tensor parallelism is not supported by profiles yet). "
            "Make one with: vllm-ext profile MODEL"
        )


def load_profile(path: Path) -> Profile:
    """Reads and validates a profile.

    Raises:
        ConfigError: unreadable, too large, not JSON, or not a valid profile; names the field.
    """
    try:
        size = path.stat().st_size
        if size > MAX_PROFILE_BYTES:
            raise ConfigError(f"profile {path} has {size} bytes; at most {MAX_PROFILE_BYTES}")
        return Profile.model_validate_json(path.read_text())
    except OSError as error:
        raise ConfigError(f"profile {path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ConfigError(f"profile {path} is not valid: {where}: {first['msg']}") from None


def fingerprint(model_folder: Path) -> str:
    """Identifies a checkpoint by its shape and samples of its weight files.

    Weight files are sampled at both ends (256 KiB each) instead of read whole, so that
    a large model costs milliseconds.

    Args:
        model_folder: a Hugging Face folder with ``config.json``.
    """
    config = json.loads((model_folder / "config.json").read_text())
    digest = hashlib.sha256(json.dumps([config.get(key) for key in _SHAPE_KEYS]).encode())
    for path in sorted(model_folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLE_BYTES))
            file.seek(max(0, size - _SAMPLE_BYTES))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def shipped_profile(model_folder: Path) -> Profile | None:
    """The profile this package ships for a checkpoint, if any."""
    if not (model_folder / "config.json").is_file():
        return None
    wanted = fingerprint(model_folder)
    for path in sorted(SHIPPED.glob("*.json")):
        profile = load_profile(path)
        if profile.fingerprint == wanted:
            return profile
    return None
