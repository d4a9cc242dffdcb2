"""Calibration profiles: one validated JSON file per checkpoint.

A profile says which layers attend densely, which are anchors, which anchor head each KV head of
the other layers follows, and which layers are dropped. ``vllm-ext profile`` writes it; profiles
that this package ships lie in ``attn_backends/profiles/`` and are found by the model's
fingerprint.
"""

from __future__ import annotations

import hashlib
import json
from itertools import combinations
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from attn_backends.config import ConfigError, read_text
from attn_backends.findings import Findings
from attn_backends.plan import LayerRole, LayerSchedule

MAX_PROFILE_BYTES = 4 << 20
SHIPPED = Path(__file__).with_name("profiles")
_SAMPLE_BYTES = 1 << 18
_ROLE_FIELDS = ("dense_layers", "anchor_layers", "drop_layers", "window_layers")
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
    drop_layers: list[int] = Field(default_factory=list)  # no attention, no KV cache (LLM-Drop)
    window_layers: list[int] = Field(default_factory=list)  # a window instead of dropping them
    findings: Findings | None = None  # measured, not used by the engine
    calibration: dict[str, Any]

    @model_validator(mode="after")
    def _layers_and_heads_exist(self) -> Profile:
        for field in (*_ROLE_FIELDS, "full_layers"):
            wrong = [layer for layer in getattr(self, field) if not 0 <= layer < self.num_layers]
            if wrong:
                raise ValueError(f"{field} has {wrong}; layers are 0 to {self.num_layers - 1}")
        self._require_one_role_each()
        first_anchor = min(self.anchor_layers, default=self.num_layers)
        placed = {*self.dense_layers, *self.drop_layers, *self.window_layers}
        uncovered = [layer for layer in range(first_anchor) if layer not in placed]
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
        if self.findings is not None:
            self.findings.require_shape(self.num_layers, self.num_kv_heads)
        return self

    def _require_one_role_each(self) -> None:
        pairs = [*combinations(_ROLE_FIELDS, 2)]
        pairs += [("full_layers", field) for field in ("drop_layers", "window_layers")]
        for one, other in pairs:
            both = sorted(set(getattr(self, one)) & set(getattr(self, other)))
            if both:
                raise ValueError(f"layers {both} cannot be both in {one} and in {other}")
        if len(set(self.drop_layers)) == self.num_layers:
            raise ValueError("drop_layers has every layer; keep at least one")

    def schedule(self) -> LayerSchedule:
        """Roles and head maps of the layers, for methods with anchors.

        Raises:
            ConfigError: the profile has ``window_layers``.
        """
        if self.window_layers:
            raise ConfigError(
                f"the profile for {self.model} has window_layers {self.window_layers}, which "
                "methods with anchors do not serve: use SINK_WINDOW (it gives every layer that "
                "is not in full_layers the window), or move them to drop_layers"
            )
        placed = {
            **dict.fromkeys(self.dense_layers, LayerRole.DENSE),
            **dict.fromkeys(self.anchor_layers, LayerRole.ANCHOR),
            **dict.fromkeys(self.drop_layers, LayerRole.DROP),
        }
        roles = tuple(placed.get(layer, LayerRole.REUSE) for layer in range(self.num_layers))
        return LayerSchedule(
            roles,
            {layer: tuple(h) for layer, h in self.head_maps.items() if layer not in placed},
        )


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
        ConfigError: not a regular file, unreadable, too large, not UTF-8, not JSON, or not a
            valid profile; names the field.
    """
    try:
        return Profile.model_validate_json(
            read_text(path, MAX_PROFILE_BYTES, named=f"profile {path}")
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ConfigError(f"profile {path} is not valid: {where}: {first['msg']}") from None


def read_model_config(model_folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a Hugging Face folder.

    Raises:
        ConfigError: it cannot be read, or is not a JSON object.
    """
    path = model_folder / "config.json"
    text = read_text(path, MAX_PROFILE_BYTES, named=str(path))
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
