"""The folder through which workers report."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest

from kvcache.adapter.figures import FOLDER_ENV
from vllm_ext import metrics


def test_nobody_else_can_read_or_write_the_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    monkeypatch.setenv(FOLDER_ENV, "")  # restored afterwards
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    metrics.create_folder()
    folder = Path(os.environ[FOLDER_ENV])
    assert folder.parent == tmp_path
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    shutil.rmtree(folder)
