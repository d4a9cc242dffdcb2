"""What the calibrating commands share: progress on a terminal, and profiles on disk."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from attn_backends.config import ConfigError
from attn_backends.profile import Profile, load_profile
from vllm_ext.errors import UserError

Settings = TypeVar("Settings")


class Bars:
    """A progress bar of the work being done, and lines above it."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._title = ""

    def show(self, title: str, done: int, total: int) -> None:
        """``done`` of ``total`` steps of what is being done."""
        if title != self._title:
            self._close()
            self._bar, self._title = tqdm(total=total, desc=title, unit="step"), title
        self._bar.update(done - self._bar.n)
        if done == total:
            self._close()

    def echo(self, line: str) -> None:
        """Prints a line; what the bar showed is over."""
        self._close()
        print(line, flush=True)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar, self._title = None, ""


def parser_of(method: str, description: str) -> argparse.ArgumentParser:
    """The flags of ``vllm-ext profile --method``, whose profile may lie where others' is.

    Args:
        method: upper-case name.
        description: for people.
    """
    prog = f"vllm-ext profile --method {method.lower()}"
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("model", type=Path, help="model folder (Llama, Qwen or Mistral style)")
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help=f"the profile to write, JSON; one that is there gains what {method} needs",
    )
    return parser


def add_settings(
    parser: argparse.ArgumentParser, settings_cls: type, helps: Mapping[str, str]
) -> None:
    """A flag for each of these numbers, and the corpus; every default is the settings'.

    Args:
        parser: of a calibrating command.
        settings_cls: a dataclass.
        helps: by flag, without dashes.
    """
    for flag, text in helps.items():
        parser.add_argument(f"--{flag}", type=int, metavar="N", help=f"{text} (%(default)s)")
    parser.add_argument("--corpus", type=Path, help="calibration text (default: Python's library)")
    known = (field for field in fields(settings_cls) if field.default is not MISSING)
    parser.set_defaults(**{field.name: field.default for field in known})


def settings_of(args: argparse.Namespace, settings_cls: type[Settings]) -> Settings:
    """What ``add_settings`` was told of, and whatever else the parser knows by a field's name."""
    known: Any = settings_cls
    made: Settings = known(**{field.name: getattr(args, field.name) for field in fields(known)})
    return made


def stay_offline() -> None:
    """transformers asks nobody, and prints errors alone."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def require_files(model: Path, corpus: Path | None) -> None:
    """What is calibrated, and on which text, must be there.

    Raises:
        UserError: names what is not.
    """
    if not (model / "config.json").is_file():
        raise UserError(f"{model} is not a model folder (no config.json)")
    if corpus is not None and not corpus.is_file():
        raise UserError(f"--corpus: {corpus} does not exist")


def require_least(given: Any, lowest_of: dict[str, int]) -> None:
    """Numbers that must not be less.

    Args:
        given: has them as attributes.
        lowest_of: by name.

    Raises:
        UserError: names the flag.
    """
    for name, lowest in lowest_of.items():
        if getattr(given, name) < lowest:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} is {getattr(given, name)}; it must be at least {lowest}")


def earlier_profile(path: Path, fingerprint: str) -> Profile | None:
    """A profile that is there already and gains a section.

    Raises:
        UserError: the file is something else, or another checkpoint's.
    """
    if not path.exists():
        return None
    try:
        profile = load_profile(path)
    except ConfigError as error:
        raise UserError(f"--output: {error}; remove it, or write to another file") from None
    if profile.fingerprint != fingerprint:
        raise UserError(
            f"--output: {path} is the profile of another checkpoint ({profile.model}); write to "
            "another file"
        )
    return profile


def joined(earlier: Profile | None, profile: Profile) -> Profile:
    """A new profile with the sections that it lacks and an earlier one has."""
    if earlier is None:
        return profile
    return Profile(
        **dict(profile)
        | {
            "methods": earlier.methods | profile.methods,
            "files": earlier.files | profile.files,
            "findings": profile.findings or earlier.findings,
            "calibration": earlier.calibration | profile.calibration,
        }
    )


def write_profile(profile: Profile, path: Path) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(profile.model_dump_json(indent=1) + "\n")
    os.replace(partial, path)
