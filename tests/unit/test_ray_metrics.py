"""Our metrics under Ray: every family, names, labels, and counters by their growth."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import Metric
from prometheus_client.core import HistogramMetricFamily, SummaryMetricFamily

from kvcache.adapter.figures import FigureFiles
from vllm_ext.metrics import WorkerFigures
from vllm_ext.ray_metrics import RayExporter


class _Instruments:
    """Stands for ``ray.util.metrics``: notes what is made and recorded."""

    def __init__(self) -> None:
        self.made: list[tuple[str, str, str, tuple[str, ...]]] = []
        self.recorded: list[tuple[str, float, dict[str, str]]] = []

    def _make(self, kind: str, name: str, text: str, keys: tuple[str, ...]) -> Any:
        self.made.append((kind, name, text, keys))

        def record(value: float, tags: dict[str, str]) -> None:
            assert tuple(tags) == keys
            self.recorded.append((name, value, tags))

        return SimpleNamespace(inc=record, set=record)

    def Counter(self, name: str, text: str, keys: tuple[str, ...]) -> Any:  # noqa: N802
        return self._make("counter", name, text, keys)

    def Gauge(self, name: str, text: str, keys: tuple[str, ...]) -> Any:  # noqa: N802
        return self._make("gauge", name, text, keys)


def test_every_family_follows_with_name_help_and_labels(tmp_path: Path) -> None:
    files, instruments = FigureFiles(tmp_path), _Instruments()
    exporter = RayExporter(WorkerFigures(tmp_path), "replica-1", instruments)
    exporter.update()
    assert instruments.made == []  # nothing is known before the workers write
    labels = {"method": "NEW", "path": "sparse"}
    files.add_to_counter("vllm_ext:new_things", "Things.", labels, 5)
    files.set_gauge("vllm_ext:new_level", "A level.", {"method": "NEW"}, 0.5)
    exporter.update()
    files.add_to_counter("vllm_ext:new_things", "Things.", labels, 2)
    exporter.update()
    exporter.update()
    files.close()
    assert sorted(instruments.made) == [
        ("counter", "vllm_ext_new_things", "Things.", ("method", "path", "ReplicaId")),
        ("gauge", "vllm_ext_new_level", "A level.", ("method", "ReplicaId")),
    ]
    counted = [value for name, value, _ in instruments.recorded if name == "vllm_ext_new_things"]
    assert counted == [5, 2]
    tags = next(tags for name, _, tags in instruments.recorded if name == "vllm_ext_new_things")
    assert tags == {**labels, "ReplicaId": "replica-1"}
    assert ("vllm_ext_new_level", 0.5, {"method": "NEW", "ReplicaId": "replica-1"}) in (
        instruments.recorded
    )


class _Source:
    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterable[Metric]:
        return [self._family]


def test_a_histogram_follows_as_gauges_of_its_samples() -> None:
    instruments = _Instruments()
    family = HistogramMetricFamily("vllm_ext:share", "", [("0.5", 1), ("+Inf", 3)], 2.2)
    RayExporter(_Source(family), "r", instruments).update()  # type: ignore[arg-type]
    assert instruments.recorded == [
        ("vllm_ext_share_bucket", 1, {"le": "0.5", "ReplicaId": "r"}),
        ("vllm_ext_share_bucket", 3, {"le": "+Inf", "ReplicaId": "r"}),
        ("vllm_ext_share_count", 3, {"ReplicaId": "r"}),
        ("vllm_ext_share_sum", 2.2, {"ReplicaId": "r"}),
    ]


def test_a_family_that_cannot_be_carried_is_an_error() -> None:
    family = SummaryMetricFamily("vllm_ext:times", "", 1, 1)
    with pytest.raises(TypeError, match="vllm_ext:times is a summary"):
        RayExporter(_Source(family), "r", _Instruments()).update()  # type: ignore[arg-type]
