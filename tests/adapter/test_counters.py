"""Row counters cross process boundaries into one scrape."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest

from attn_backends.adapter.counters import AuditFigures, RowCounters
from attn_backends.recall import RecallWatch
from kvcache.adapter.figures import FOLDER_ENV, figure_files
from vllm_ext.metrics import WorkerFigures, decode_rows, draft_rows

WORKER = """
from attn_backends.adapter.counters import RowCounters
counters = RowCounters("SINK_WINDOW")
counters.add({("sparse", "selected"): 3, ("sparse", "everything_kept"): 0})
counters.add({("sparse", "selected"): 3})
counters.add({("dense", "unsupported"): 2})
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(FOLDER_ENV, str(tmp_path))
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    yield tmp_path
    if (files := figure_files()) is not None:
        files.close()


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


def test_routes_are_counted_by_group(folder: Path) -> None:
    counters = RowCounters("FLUX")
    counters.add_routes({(0, "full"): 2, (1, "sparse"): 2})
    counters.add_routes({(0, "full"): 1, (1, "no_evidence"): 1})
    registry = CollectorRegistry()
    registry.register(WorkerFigures(folder))
    text = generate_latest(registry).decode()
    for group, route, requests in (("0", "full", 3), ("1", "sparse", 2), ("1", "no_evidence", 1)):
        labels = f'group="{group}",method="FLUX",route="{route}"'
        assert f"vllm_ext:routes_total{{{labels}}} {requests}.0" in text


ENGINE = """
import sys
from attn_backends.adapter.counters import RowCounters
from kvcache.adapter.figures import figure_files
rows, held = int(sys.argv[2]), int(sys.argv[3])
RowCounters("TIDAL_DECODE").add({(sys.argv[1], "any"): rows})
figure_files().set_part("vllm_ext:kv_blocks_held", "Held.", {"group": "0"}, held)
print("written", flush=True)
sys.stdin.read()
"""
HELD = "vllm_ext:kv_blocks_held"


def test_gauges_are_of_all_engines(folder: Path) -> None:
    def start(path: str, rows: int, held: int) -> subprocess.Popen[str]:
        argv = [sys.executable, "-c", ENGINE, path, str(rows), str(held)]
        pipe = subprocess.PIPE
        engine = subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True)
        assert engine.stdout is not None
        assert engine.stdout.readline() == "written\n"
        return engine

    def samples() -> dict[str, float]:
        found = (sample for family in WorkerFigures(folder).collect() for sample in family.samples)
        return {sample.name: sample.value for sample in found}

    with start("sparse", 1000, 100) as first, start("dense", 1, 7) as second:
        assert samples()[HELD] == 107
        assert samples()["vllm_ext:activation_ratio"] == 1000 / 1001
        for engine in (first, second):
            engine.kill()
    # What a killed engine held is nobody's: the next one in the folder says so.
    with start("sparse", 1, 5) as third:
        assert samples()[HELD] == 5
        assert samples()["vllm_ext:activation_ratio"] == 1001 / 1002
        third.kill()


def _watch(recall: float) -> RecallWatch:
    watch = RecallWatch(0.5, 1, 64, 4, torch.device("cpu"))
    for _ in range(2):
        watch.begin_step(["a"])
        watch.expect(["a"], [0])
        watch.recall[:1].fill_(recall)
    watch.begin_step([])
    return watch


def test_counters_go_on_where_a_builder_is_made_anew(folder: Path) -> None:
    totals: list[dict[str, float]] = []
    for recall in (0.1, 0.9):
        counters, audit = RowCounters("TIDAL_DECODE"), AuditFigures("TIDAL_DECODE")
        counters.add({("sparse", "selected"): 3})
        watch = _watch(recall)
        for _ in range(2):  # the second time there is nothing new
            counters.show_recall(watch)
        audit.add([0.5], [True], 100)
        samples = (s for f in WorkerFigures(folder).collect() for s in f.samples)
        totals.append(
            {f"{s.name} {s.labels}": s.value for s in samples if "_recall " not in s.name}
        )
    first, second = totals
    assert any("kind" in name for name in first)
    for name, value in second.items():
        assert value >= first.get(name, 0.0), name
    for name, before, after in (
        ("decode_rows_total", 3, 6),
        ("selection_recall_hist_count", 2, 4),
        ("audit_kv_bytes_saved_total", 100, 200),
    ):
        (key,) = [
            key
            for key in second
            if f":{name} " in key and "'own'" not in key and "'inherited'" not in key
        ]
        assert (first[key], second[key]) == (before, after)


def test_a_watch_that_stays_is_not_counted_twice(folder: Path) -> None:
    watch = _watch(0.1)
    for _ in range(2):
        RowCounters("TIDAL_DECODE").show_recall(watch)
    found = {
        (sample.name, sample.labels.get("kind")): sample.value
        for family in WorkerFigures(folder).collect()
        for sample in family.samples
    }
    assert found["vllm_ext:selection_recall_hist_count", "served"] == 2


def test_bytes_saved_wait_for_those_that_were_read_twice(folder: Path) -> None:
    audit = AuditFigures("TIDAL_DECODE")
    shown = []
    for saved_bytes in (-50, 20, 100, -10, 30):
        audit.add([0.0], [True], saved_bytes)
        (found,) = [
            sample.value
            for family in WorkerFigures(folder).collect()
            for sample in family.samples
            if sample.name == "vllm_ext:audit_kv_bytes_saved_total"
        ]
        shown.append(found)
    assert shown == [0, 0, 70, 70, 90]


def test_rows_that_draft_are_not_decode_rows(folder: Path) -> None:
    counters = RowCounters("TIDAL_DECODE")
    counters.add_drafted({("sparse", "selected"): 3, ("dense", "request_off"): 1})
    counters.add_drafted({("none", "short_context"): 4})
    counters.add_verified(8)
    counters.add_verified(0)
    assert decode_rows() == {}
    assert draft_rows() == {
        ("TIDAL_DECODE", "sparse", "selected"): 3,
        ("TIDAL_DECODE", "dense", "request_off"): 1,
        ("TIDAL_DECODE", "none", "short_context"): 4,
    }
    values = {
        sample.name: sample.value
        for family in WorkerFigures(folder).collect()
        if family.name in ("vllm_ext:verify_rows", "vllm_ext:activation_ratio")
        for sample in family.samples
    }
    assert values == {"vllm_ext:verify_rows_total": 8, "vllm_ext:activation_ratio": 3 / 8}


def test_no_folder_means_no_export_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER_ENV, raising=False)
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    RowCounters("SPARSE_FULL").add({("sparse", "selected"): 1})
    assert decode_rows() == {}


def test_a_folder_that_vanished_reads_as_nothing(folder: Path) -> None:
    folder.rmdir()
    assert list(WorkerFigures(folder).collect()) == []


def test_rows_that_a_graph_is_captured_with_are_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ``--no-strict`` lets stock vLLM serve, counted."""
    from attn_backends.adapter import fallback

    class Stock:
        def __init__(self, *given: Any) -> None: ...

        def build(self, *given: Any) -> str:
            return "built"

        def build_for_cudagraph_capture(self, common: Any) -> str:
            return self.build(0, common)

    counted: list[Any] = []
    counters = SimpleNamespace(add=counted.append)
    monkeypatch.setattr(fallback, "RowCounters", lambda name: counters)
    monkeypatch.setattr(fallback, "get_layers_from_vllm_config", lambda *_: {"layers.0.attn": None})
    config = SimpleNamespace(parallel_config=SimpleNamespace(rank=0))
    builder = fallback._counting_builder(Stock, "TIDAL_DECODE")(None, ["layers.0.attn"], config)
    common = SimpleNamespace(
        query_start_loc_cpu=torch.tensor([0, 1, 2]), num_reqs=2, is_prefilling=None
    )
    assert builder.build_for_cudagraph_capture(common) == "built"
    assert counted == []
    assert builder.build(0, common) == "built"
    assert [sum(rows.values()) for rows in counted] == [2]
