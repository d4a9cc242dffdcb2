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
    """Memory-mapped counters and gauges of one process; a write is a handful of bytes.

    Counters and histograms are added to, so that what this process counted before stays when
    whoever counts (a metadata builder, a manager) is made anew.
    """

    def __init__(self, folder: Path) -> None:
        pid = os.getpid()
        _forget_dead_parts(folder)
        self._counters = MmapedDict(str(folder / f"counter_vllmext-{pid}.db"))
        self._histograms = MmapedDict(str(folder / f"histogram_vllmext-{pid}.db"))
        self._gauges = MmapedDict(str(folder / f"gauge_mostrecent_vllmext-{pid}.db"))
        self._parts = MmapedDict(str(folder / f"gauge_livesum_vllmext-{pid}.db"))

    def add_to_counter(self, name: str, text: str, labels: dict[str, str], amount: float) -> None:
        """Raises a counter.

        Args:
            name: without ``_total``.
            text: the help text.
            labels: by name.
            amount: 0 or more.
        """
        _add(self._counters, _key(name, name + "_total", tuple(labels.items()), text), amount)

    def set_gauge(self, name: str, text: str, labels: dict[str, str], value: float) -> None:
        """Sets a gauge that no other process has under these labels; the last value counts."""
        key = _key(name, name, tuple(labels.items()), text)
        self._gauges.write_value(key, float(value), time.time())

    def set_part(self, name: str, text: str, labels: dict[str, str], value: float) -> None:
        """Sets this process's part of a gauge that is the sum over processes."""
        self._parts.write_value(_key(name, name, tuple(labels.items()), text), float(value), 0.0)

    def add_to_histogram(
        self,
        name: str,
        text: str,
        labels: dict[str, str],
        counts: dict[float, int],
        total: float,
    ) -> None:
        """Adds observations to a histogram.

        Args:
            name: without a suffix.
            text: the help text.
            labels: by name.
            counts: new observations by the upper bound of their bucket, not cumulated; the last
                bound is infinite.
            total: sum of the new observations.
        """
        for bound, count in counts.items():
            with_bound = (*labels.items(), ("le", floatToGoString(bound)))
            _add(self._histograms, _key(name, name + "_bucket", with_bound, text), count)
        _add(self._histograms, _key(name, name + "_sum", tuple(labels.items()), text), total)

    def close(self) -> None:
        """Closes the files; what they say stays."""
        for values in (self._counters, self._histograms, self._gauges, self._parts):
            values.close()


def _forget_dead_parts(folder: Path) -> None:
    """Removes the parts of processes that were killed: nothing else would, in a folder that
    outlives its server (``PROMETHEUS_MULTIPROC_DIR`` of the user's own).
    """
    for path in folder.glob("gauge_livesum_vllmext-*.db"):
        try:
            os.kill(int(path.stem.rpartition("-")[2]), 0)
        except ProcessLookupError:
            path.unlink(missing_ok=True)
        except (PermissionError, ValueError):
            continue


def _add(values: MmapedDict, key: str, amount: float) -> None:
    before, _ = values.read_value(key)
    values.write_value(key, before + amount, 0.0)


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
