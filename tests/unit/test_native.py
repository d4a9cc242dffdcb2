"""The build of the CPU kernels, with a compiler that only pretends."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import cpp_extension

from attn_backends import native
from attn_backends.ops.dispatch import OpContext, OpImpl, resolve
from kvcache.layout import KVOrder, PagedKVLayout


@pytest.fixture
def paths_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """PATH of every pretended compilation into a cache of the test's own."""
    seen: list[str] = []

    def compile_(build_directory: str, **_: Any) -> None:
        baton = Path(build_directory, "lock")
        assert not baton.exists(), "torch would wait for ever for whoever made it"
        baton.touch()
        seen.append(os.environ["PATH"])
        Path(build_directory, native.LIBRARY_NAME).write_bytes(b"library")
        baton.unlink()

    monkeypatch.setattr(cpp_extension, "load", compile_)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", sys.executable)  # there is one, wherever PATH leads
    return seen


def test_builds_that_were_killed_are_neither_waited_for_nor_kept(paths_seen: list[str]) -> None:
    cache = native.library_path().parent
    for name in (f"build-{os.getpid()}", "build-1"):  # in containers, a process has its old number
        killed = cache / name
        killed.mkdir(parents=True)
        (killed / "lock").touch()
        (killed / "build.ninja").touch()
    assert native.build().read_bytes() == b"library"
    assert sorted(path.name for path in cache.iterdir()) == ["lock", native.LIBRARY_NAME]
    assert native.build() == native.library_path()
    assert len(paths_seen) == 1  # the second call found it


def test_a_failed_build_leaves_nothing(
    paths_seen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: Any) -> None:
        raise RuntimeError("Error building extension")

    monkeypatch.setattr(cpp_extension, "load", fail)
    with pytest.raises(native.NativeBuildError, match="did not compile"):
        native.build()
    assert [path.name for path in native.library_path().parent.iterdir()] == ["lock"]


@pytest.mark.parametrize("given", [None, "", os.pathsep, f"{os.pathsep}/bin", f"/bin{os.pathsep}"])
def test_no_program_is_looked_for_in_the_current_folder(
    given: str | None, paths_seen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if given is None:
        monkeypatch.delenv("PATH")
    else:
        monkeypatch.setenv("PATH", given)
    native.build()
    [searched] = paths_seen
    assert all(Path(entry).is_absolute() for entry in searched.split(os.pathsep)), searched
    assert {str(Path(sys.executable).parent), "/bin"} <= set(searched.split(os.pathsep))
    assert os.environ.get("PATH") == given


def _is_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "file"))


def _cannot_be_entered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exists = Path.exists

    def refuse(self: Path) -> bool:
        if self.is_relative_to(folder):
            raise PermissionError(13, "Permission denied", str(self))
        return exists(self)

    monkeypatch.setattr(Path, "exists", refuse)


def _cannot_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, **_: Any) -> None:
        raise OSError(30, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)


def _is_nowhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", fail)


def _runs_full(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cpp_extension, "load", fail)


@pytest.mark.parametrize(
    "spoil", [_is_a_file, _cannot_be_entered, _cannot_be_written, _is_nowhere, _runs_full]
)
def test_a_cache_that_cannot_be_used_names_the_remedy(
    spoil: Callable[[Path, pytest.MonkeyPatch], None],
    paths_seen: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoil(tmp_path, monkeypatch)
    with pytest.raises(native.NativeBuildError) as error:
        native.build()
    assert "XDG_CACHE_HOME" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_the_slow_reference_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    reason = "the cache of test_the_slow_reference_is_told_of_once cannot be written"

    def run() -> None:
        """Never called."""

    for op in ("cache_write", "sparse_decode"):
        impls = [
            OpImpl(op, "cpu", run, lambda context: reason),
            OpImpl(op, "reference", run, lambda context: None),
        ]
        for head_size in (64, 128):
            layout = PagedKVLayout(4, 32, 2, head_size, torch.bfloat16, KVOrder.KEY_TRANSPOSED)
            assert resolve(impls, OpContext(layout, 4, "cpu", True)).name == "reference"
    [line] = [record.getMessage() for record in caplog.records if reason in record.getMessage()]
    assert "slow reference" in line
