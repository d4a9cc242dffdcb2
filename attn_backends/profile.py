"""Calibration profiles: one validated JSON file per checkpoint.

A profile is a header, which says what checkpoint it is of, and a section for each method that was
calibrated: which layers it serves how. Larger data lies in files beside it, which the header names
with their SHA-256. ``vllm-ext profile`` writes profiles; those that this package ships lie in
``attn_backends/profiles/`` and are found by the model's fingerprint.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)
from pydantic_core import from_json

from attn_backends.checkpoint import fingerprint
from attn_backends.config import ConfigError, read_bytes, read_text
from attn_backends.findings import Findings

SCHEMA_VERSION = 2
MAX_PROFILE_BYTES = 4 << 20
MAX_FILE_BYTES = 64 << 20  # of a file beside a profile
SHIPPED = Path(__file__).with_name("profiles")
_SECTIONS_OF_VERSION_1 = {
    "TIDAL_DECODE": ("dense_layers", "anchor_layers", "head_maps", "drop_layers"),
    "SINK_WINDOW": ("full_layers", "drop_layers"),
}

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
MethodName = Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]{0,63}$")]
# Formats that run nothing when they are read.
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}\.(json|safetensors)$")]


class NoSectionError(ConfigError):
    """Nobody calibrated the method: no profile, or one that says nothing to it."""


class ProfileSection(BaseModel):
    """What a profile says to one method; each method that reads profiles has its own kind.

    Layers and heads are 0-based.

    Attributes:
        made_by: the command that calibrates it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    made_by: ClassVar[str]

    def require_shape(self, num_layers: int, num_kv_heads: int) -> None:
        """Refuses what a model of this shape does not have, or cannot be given at once.

        Raises:
            ValueError: names the field.
        """


Section = TypeVar("Section", bound=ProfileSection)


def require_placed(placed: Mapping[str, Collection[int]], num_layers: int) -> None:
    """Checks the lists by which a section gives layers their roles.

    Args:
        placed: layers by the name of the list.
        num_layers: of the model.

    Raises:
        ValueError: a layer that does not exist or is in two lists, or ``drop_layers`` has all.
    """
    for field, layers in placed.items():
        wrong = [layer for layer in layers if not 0 <= layer < num_layers]
        if wrong:
            raise ValueError(f"{field} has {wrong[:5]}; layers are 0 to {num_layers - 1}")
    for one, other in combinations(placed, 2):
        both = sorted({*placed[one]} & {*placed[other]})
        if both:
            raise ValueError(f"layers {both} cannot be both in {one} and in {other}")
    if len({*placed.get("drop_layers", ())}) == num_layers:
        raise ValueError("drop_layers has every layer; keep at least one")


class Profile(BaseModel):
    """The file's content.

    Attributes:
        methods: a section for each method, by its name; checked when it is asked for
            (``section``), since this module knows no method.
        files: of the profile's folder, which sections may ask for (``read_file``): SHA-256 by name.
        findings: measured, not used by the engine.
        calibration: how it was made, for people.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = Field(ge=SCHEMA_VERSION, le=SCHEMA_VERSION)
    fingerprint: Sha256
    model: str = Field(max_length=200)
    num_layers: int = Field(ge=1, le=1024)
    num_kv_heads: int = Field(ge=1, le=1024)
    methods: dict[MethodName, dict[str, Any]] = Field(default_factory=dict)
    files: dict[FileName, Sha256] = Field(default_factory=dict, max_length=64)
    findings: Findings | None = None
    calibration: dict[str, Any]
    _path: Path | None = PrivateAttr(None)  # where it was read

    @model_validator(mode="after")
    def _findings_fit(self) -> Profile:
        if self.findings is not None:
            self.findings.require_shape(self.num_layers, self.num_kv_heads)
        return self

    def section(self, method: str, section_cls: type[Section]) -> Section:
        """What the profile says to a method.

        Args:
            method: its name.
            section_cls: its kind of section.

        Raises:
            NoSectionError: there is nothing for this method.
            ConfigError: nothing valid; names the field.
        """
        if method not in self.methods:
            raise NoSectionError(
                f"{self._named()} has nothing for {method} (it has: "
                f"{', '.join(self.methods) or 'no method'}); make one with: {section_cls.made_by}"
            )
        try:
            section = section_cls.model_validate(self.methods[method])
            section.require_shape(self.num_layers, self.num_kv_heads)
        except ValueError as error:
            raise _invalid(self._named(), error, f"methods.{method}") from None
        return section

    def with_section(self, method: str, section: ProfileSection) -> Profile:
        """The profile with a section more, for the command that makes it.

        Raises:
            ValueError: the section does not fit the header.
        """
        section.require_shape(self.num_layers, self.num_kv_heads)
        methods = {**self.methods, method: json.loads(section.model_dump_json())}
        return Profile(**(dict(self) | {"methods": methods}))

    def read_file(self, name: str) -> bytes:
        """Content of a file beside the profile.

        Args:
            name: one of ``files``.

        Raises:
            ConfigError: not named there, or see ``read_beside``.
        """
        if name not in self.files:
            raise ConfigError(f"{self._named()} names no file {name!r:.120} beside it")
        return self.read_beside(name, self.files[name])

    def read_beside(self, name: str, sha256: str) -> bytes:
        """Content of a file beside the profile, which a section names itself.

        Args:
            name: of the file, without a folder.
            sha256: what it must have.

        Raises:
            ConfigError: not in the profile's folder, too large, or not what it was when the
                profile was made.
        """
        if self._path is None:
            raise ConfigError(f"{self._named()} was not read from a file: nothing is beside it")
        path = self._path.parent / name
        if os.path.dirname(os.path.realpath(path)) != os.path.realpath(self._path.parent):
            raise ConfigError(f"{path} is a link out of the folder of {self._named()}; copy it")
        content = read_bytes(path, MAX_FILE_BYTES, named=str(path))
        if hashlib.sha256(content).hexdigest() != sha256:
            raise ConfigError(
                f"{path} is not the file that {self._named()} was made with (its SHA-256 differs); "
                "take both from the same calibration"
            )
        return content

    def _named(self) -> str:
        return f"profile for {self.model}" if self._path is None else f"profile {self._path}"


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
    """Reads a profile and validates its header; ``Profile.section`` validates the rest.

    Raises:
        ConfigError: not a regular file, unreadable, too large, not UTF-8, not JSON, or not a
            valid profile; names the field.
    """
    named = f"profile {path}"
    text = read_text(path, MAX_PROFILE_BYTES, named)
    try:
        raw = from_json(text)
        if isinstance(raw, dict) and raw.get("schema_version") == 1:
            raw = _from_version_1(raw)
        profile = Profile.model_validate(raw)
    except ValueError as error:
        raise _invalid(named, error) from None
    profile._path = path
    return profile


def _from_version_1(raw: dict[str, Any]) -> dict[str, Any]:
    """A file of schema 1, where fields of both methods stood side by side.

    ``window_layers`` was inert: SINK_WINDOW gives each layer that is in no other list the window,
    and methods with anchors refused such a file. So they find nothing in it now.

    Raises:
        ValueError: a field that no file of schema 1 has, or ``window_layers`` is no list of layers.
    """
    fields = {field for names in _SECTIONS_OF_VERSION_1.values() for field in names}
    header = {key: value for key, value in raw.items() if key not in {*fields, "window_layers"}}
    for key in ("methods", "files"):
        if key in header:
            raise ValueError(f"{key} is not of schema_version 1, but of {SCHEMA_VERSION}")
    windows = raw.get("window_layers", [])
    if not isinstance(windows, list) or any(type(layer) is not int for layer in windows):
        raise ValueError(f"window_layers is {windows!r:.80}; it must be a list of layers")
    sections = {
        method: {name: raw[name] for name in names if name in raw}
        for method, names in _SECTIONS_OF_VERSION_1.items()
        if not (windows and "anchor_layers" in names)
    }
    return header | {"schema_version": SCHEMA_VERSION, "methods": sections}


def _invalid(named: str, error: ValueError, section: str = "") -> ConfigError:
    """The first problem of a profile in one line."""
    where, problem = [section] if section else [], str(error)
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        where += [str(step) for step in first["loc"]]
        problem = first["msg"]
    line = " ".join(f"{'.'.join(where) or 'the file'}: {problem}".split())  # names may be anything
    return ConfigError(f"{named} is not valid: {line:.500}")


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
