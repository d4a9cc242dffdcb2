"""Files that users name may be anything: none is waited for, read without end or believed."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from attn_backends.config import ConfigError
from attn_backends.profile import fingerprint, load_profile, shipped_profile
from vllm_ext.calibration.trials import Trials
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


@pytest.mark.parametrize("content", ["{", "[]", "null", '"text"', "[" * 100_000])
def test_a_model_config_is_a_json_object(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json is not "):
        shipped_profile(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b'{"key": 1, "verdicts": 2}', b"\xff"])
def test_a_state_that_is_not_of_a_calibration_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "p.state.json").write_bytes(content)
    with pytest.raises(UserError, match=r"p\.state\.json is not of an interrupted calibration"):
        Trials(tmp_path / "p.state.json", {})
