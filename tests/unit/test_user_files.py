"""Files that users name may be anything: none is waited for, read without end or believed."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from attn_backends.checkpoint import fingerprint
from attn_backends.config import ConfigError
from attn_backends.methods import REGISTRY, load_method
from attn_backends.profile import load_profile, shipped_profile
from tests.profiles import HEADER, PROFILE, SECTIONS
from vllm_ext.calibration.state import SavedState
from vllm_ext.cli.policy_file import read_policy
from vllm_ext.engine_process import kv_token_bytes
from vllm_ext.errors import UserError


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _folder(path: Path) -> None:
    path.mkdir()


def _latin_1(path: Path) -> None:
    path.write_bytes('{"model": "é"}'.encode("latin-1"))


def _huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 33)  # sparse


def _loop(path: Path) -> None:
    path.symlink_to(path)


def _model_folder(path: Path) -> Path:
    (path.parent / "config.json").symlink_to(path)
    return path.parent


READERS: dict[str, Callable[[Path], Any]] = {
    "profile": load_profile,
    "policy": lambda path: read_policy(str(path)),
    "model": lambda path: kv_token_bytes(str(_model_folder(path)), "auto"),
    "fingerprint": lambda path: fingerprint(_model_folder(path)),
}


def _refusal(read: Callable[[Path], Any], path: Path) -> str:
    """The message of the user error that reading gives, soon."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            read(path)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive(), "it waits"
    assert errors, "it was accepted"
    assert isinstance(errors[0], (ConfigError, UserError)), repr(errors[0])
    return str(errors[0])


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_fifo, "is not a regular file"),
        (_endless, "is not a regular file"),
        (_folder, "cannot be read: Is a directory"),
        (_latin_1, "is not UTF-8 text (byte 11)"),
        (_huge, "has more than"),
        (_loop, "cannot be read: Too many levels of symbolic links"),
    ],
)
def test_what_is_no_text_file_is_refused(
    make: Callable[[Path], None], words: str, reader: str, tmp_path: Path
) -> None:
    path = tmp_path / "given.json"
    make(path)
    message = _refusal(READERS[reader], path)
    assert words in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
@pytest.mark.parametrize("reader", ["profile", "policy"])
def test_a_name_that_no_file_can_have_is_refused(reader: str, name: str) -> None:
    assert "cannot be read" in _refusal(READERS[reader], Path(name))


PROFILES: dict[str, dict[str, Any]] = {
    "version 2": PROFILE,
    "version 1": HEADER
    | {"schema_version": 1, "full_layers": [2], "window_layers": []}
    | SECTIONS["TIDAL_DECODE"],
}
ABSURD: tuple[Any, ...] = (
    *(None, True, -1, 1 << 70, 0.5, "", "x\ny", "\x00", [], [[]], [-1], [1 << 70], ["x"], [None]),
    *({}, {"": {}}, {"-1": [0]}, {"x\ny": 1}, {"1": {"1": {}}}, {"99999999999999999999": [0]}),
)


def _changed(value: Any) -> Iterator[Any]:
    """The value with one thing in it replaced, added or taken away."""
    yield from ABSURD
    places: Any = ()
    if isinstance(value, dict):
        yield from (value | {name: inner} for name in ("x\ny", "methods", "7") for inner in ABSURD)
        places = value
    elif isinstance(value, list):
        places = range(len(value))
    for place in places:
        for inner in _changed(value[place]):
            copy = value.copy()
            copy[place] = inner
            yield copy
        copy = value.copy()
        del copy[place]
        yield copy


def _problem(path: Path, method: str) -> str | None:
    """Why a method refuses a profile, or None."""
    section_cls = load_method(method).profile_section
    assert section_cls is not None
    try:
        load_profile(path).section(method, section_cls)
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("version", "method"),
    [
        *(("version 2", name) for name in REGISTRY if load_method(name).profile_section),
        *(("version 1", name) for name in ("TIDAL_DECODE", "SINK_WINDOW")),
    ],
)
def test_profiles_with_anything_in_them_are_read_or_refused_in_one_line(
    version: str, method: str, tmp_path: Path
) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps(PROFILES[version]))
    assert _problem(path, method) is None
    problems = []
    for content in _changed(PROFILES[version]):
        path.write_text(json.dumps(content))
        problems.append(_problem(path, method))
    found = [problem for problem in problems if problem is not None]
    assert all(len(problem.splitlines()) == 1 and len(problem) < 1000 for problem in found)
    assert 100 < len(found) < len(problems) - 50  # sections of others are not its business


@pytest.mark.parametrize("content", ["{", "[]", "null", '"text"', "[" * 100_000])
def test_a_model_config_is_a_json_object(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json is not "):
        shipped_profile(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b'{"key": 1, "found": 2}', b"\xff"])
def test_a_state_that_is_not_of_a_calibration_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "p.state.json").write_bytes(content)
    with pytest.raises(UserError, match=r"p\.state\.json is not of an interrupted calibration"):
        SavedState(tmp_path / "p.state.json", {})
