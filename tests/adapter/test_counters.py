"""Row counters cross process boundaries into one scrape."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from attn_backends.adapter.counters import RowCounters
from kvcache.adapter.figures import FOLDER_ENV
from vllm_ext.metrics import WorkerFigures, decode_rows

WORKER = """
from attn_backends.adapter.counters import RowCounters
counters = RowCounters("SINK_WINDOW")
counters.add({("sparse", "selected"): 3, ("sparse", "everything_kept"): 0})
counters.add({("sparse", "selected"): 3})
counters.add({("dense", "unsupported"): 2})
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER_ENV, str(tmp_path))
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    return tmp_path


def test_figures_of_two_worker_processes_add_up(folder: Path) -> None:
    for _ in range(2):
        subprocess.run([sys.executable, "-c", WORKER], check=True, env=os.environ | {})
    assert decode_rows() == {
        ("SINK_WINDOW", "sparse", "selected"): 12,
        ("SINK_WINDOW", "dense", "unsupported"): 4,
    }
    registry = CollectorRegistry()
    registry.register(WorkerFigures(folder))
    text = generate_latest(registry).decode()
    assert (
        'vllm_ext:decode_rows_total{method="SINK_WINDOW",path="sparse",reason="selected"} 12.0'
        in text
    )
    assert 'vllm_ext:activation_ratio{method="SINK_WINDOW"} 0.75' in text


def test_no_folder_means_no_export_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER_ENV, raising=False)
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    counters = RowCounters("SPARSE_FULL")
    counters.add({("sparse", "selected"): 1})
    assert counters.activation_ratio == 1.0
    assert decode_rows() == {}


def test_a_folder_that_vanished_reads_as_nothing(folder: Path) -> None:
    folder.rmdir()
    assert list(WorkerFigures(folder).collect()) == []
