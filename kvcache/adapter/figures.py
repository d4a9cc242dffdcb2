"""Figures of engine processes on their way to /metrics.

Engine processes write into prometheus_client's own multiprocess file format, in a folder that
the front-end process creates before it starts them; the front end reads it at scrape time
(vllm_ext/metrics.py). Where vLLM itself runs prometheus in multiprocess mode, its folder
is used and its collector reads ours too.
"""

from __future__ import annotations

import os
import time
from functools import cache
from pathlib import Path

from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.utils import floatToGoString

FOLDER_ENV = "VLLM_EXT_METRICS_DIR"


def metrics_folder() -> Path | None:
    """Where figures go, or None when nobody will read them."""
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR") or os.environ.get(FOLDER_ENV)
    return Path(folder) if folder and Path(folder).is_dir() else None


class FigureFiles:
    """Memory-mapped counters and gauges of one process; a write is a handful of bytes."""

    def __init__(self, folder: Path) -> None:
        pid = os.getpid()
        self._counters = MmapedDict(str(folder / f"counter_vllmext-{pid}.db"))
        self._histograms = MmapedDict(str(folder / f"histogram_vllmext-{pid}.db"))
        self._gauges = MmapedDict(str(folder / f"gauge_mostrecent_vllmext-{pid}.db"))

    def set_counter(self, name: str, text: str, labels: dict[str, str], total: float) -> None:
        """Sets a counter to its total so far.

        Args:
            name: without ``_total``.
            text: the help text.
            labels: by name.
            total: never falls.
        """
        key = _key(name, name + "_total", tuple(labels.items()), text)
        self._counters.write_value(key, float(total), 0.0)

    def set_gauge(self, name: str, text: str, labels: dict[str, str], value: float) -> None:
        """Sets a gauge; ``MmapedDict`` chooses "mostrecent" ones by their time stamp."""
        key = _key(name, name, tuple(labels.items()), text)
        self._gauges.write_value(key, float(value), time.time())

    def set_histogram(
        self,
        name: str,
        text: str,
        labels: dict[str, str],
        counts: dict[float, int],
        total: float,
    ) -> None:
        """Sets a histogram to what it counted so far.

        Args:
            name: without a suffix.
            text: the help text.
            labels: by name.
            counts: observations by the upper bound of their bucket, not cumulated; the last
                bound is infinite.
            total: sum of all observations.
        """
        for bound, count in counts.items():
            with_bound = (*labels.items(), ("le", floatToGoString(bound)))
            key = _key(name, name + "_bucket", with_bound, text)
            self._histograms.write_value(key, float(count), 0.0)
        key = _key(name, name + "_sum", tuple(labels.items()), text)
        self._histograms.write_value(key, total, 0.0)


@cache
def _key(name: str, sample: str, labels: tuple[tuple[str, str], ...], text: str) -> str:
    """prometheus_client's key: JSON, made once and not in every step."""
    key: str = mmap_key(
        name, sample, [label for label, _ in labels], [value for _, value in labels], text
    )
    return key


def figure_files() -> FigureFiles | None:
    """This process's files, or None when nobody will read them."""
    folder = metrics_folder()
    return None if folder is None else _files_of(folder, os.getpid())


@cache
def _files_of(folder: Path, pid: int) -> FigureFiles:
    # Two MmapedDicts on one file would overwrite each other: one per process and folder.
    return FigureFiles(folder)
