"""Our metrics in the front end's /metrics, collected from every worker process."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from kvcache.adapter.figures import FOLDER_ENV, metrics_folder

RATIO = "vllm_ext:activation_ratio"
RATIO_HELP = (
    "Share of decode rows served by the sparse path since the start, over all engines; of a "
    "lossless server, of the rows that drafted."
)
ROWS = "vllm_ext:decode_rows"
DRAFT_ROWS = "vllm_ext:draft_rows"  # of a server whose sparse rows draft: it has no others


class WorkerFigures(Collector):
    """Reads, at scrape time, what the workers wrote into the folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def describe(self) -> Iterable[Metric]:
        """Nothing is known before the workers write; keeps registration from collecting."""
        return []

    def collect(self) -> Iterable[Metric]:
        """All families of all workers, and the ratio that follows from their rows."""
        if not self._folder.is_dir():
            return []
        collector: Any = MultiProcessCollector  # prometheus_client is partly untyped
        families: list[Metric] = [*collector(CollectorRegistry(), path=str(self._folder)).collect()]
        counted = [family for family in families if family.name in (ROWS, DRAFT_ROWS)]
        return [*families, *map(_ratio, counted)]


def _ratio(rows: Metric) -> Metric:
    """Sparse rows over all decode rows, by method."""
    totals: Counter[tuple[str, bool]] = Counter()
    for sample in rows.samples:
        totals[sample.labels["method"], sample.labels["path"] == "sparse"] += int(sample.value)
    family = GaugeMetricFamily(RATIO, RATIO_HELP, labels=["method"])
    for method in sorted({method for method, _ in totals}):
        sparse, dense = totals[method, True], totals[method, False]
        if sparse + dense:  # a worker may be about to write its first
            family.add_metric([method], sparse / (sparse + dense))
    return family


def create_folder() -> None:
    """Makes the folder through which workers report; called before they are started.

    The first process of a server creates it and removes it at exit; children inherit its
    name through the environment.
    """
    if metrics_folder() is not None:
        return
    folder = tempfile.mkdtemp(prefix="vllm-ext-metrics-")
    os.environ[FOLDER_ENV] = folder
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # a forked child must not remove its parent's folder
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)


_exported: set[Path] = set()


def export() -> None:
    """Adds the workers' figures to this process's registry, once per folder.

    In prometheus multiprocess mode vLLM's own collector reads the same folder, and shows
    everything but the ratio, which no process can know.
    """
    folder = metrics_folder()
    if folder is None or "PROMETHEUS_MULTIPROC_DIR" in os.environ or folder in _exported:
        return
    _exported.add(folder)
    REGISTRY.register(WorkerFigures(folder))


def decode_rows() -> dict[tuple[str, str, str], float]:
    """Rows served so far by (method, path, reason), over all workers of this server."""
    return _rows(ROWS)


def draft_rows() -> dict[tuple[str, str, str], float]:
    """The same of rows that drafted, where sparse rows only draft."""
    return _rows(DRAFT_ROWS)


def _rows(name: str) -> dict[tuple[str, str, str], float]:
    folder = metrics_folder()
    if folder is None:
        return {}
    return {
        (labels["method"], labels["path"], labels["reason"]): sample.value
        for family in WorkerFigures(folder).collect()
        if family.name == name
        for sample in family.samples
        if (labels := sample.labels)
    }
