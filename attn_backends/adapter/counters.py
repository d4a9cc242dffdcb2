"""Figures of worker processes on their way to /metrics.

Workers write into prometheus_client's own multiprocess file format, in a folder that the
front-end process creates before it starts them; the front end reads it at scrape time
(vllm_ext/metrics.py). Where vLLM itself runs prometheus in multiprocess mode, its folder
is used and its collector reads ours too.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from prometheus_client.mmap_dict import MmapedDict, mmap_key

FOLDER_ENV = "VLLM_EXT_METRICS_DIR"
ROWS = "vllm_ext:decode_rows"
ROWS_HELP = "Decode rows served, by method, path (sparse or dense) and reason."
RATIO = "vllm_ext:activation_ratio"
RATIO_HELP = "Share of decode rows served by the sparse path since the start."


def metrics_folder() -> Path | None:
    """Where figures go, or None when nobody will read them."""
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR") or os.environ.get(FOLDER_ENV)
    return Path(folder) if folder and Path(folder).is_dir() else None


class RowCounters:
    """Counts decode rows of one worker; a handful of memory-mapped writes per step."""

    def __init__(self, method: str) -> None:
        self._method = method
        self._rows: dict[tuple[str, str], int] = {}
        folder = metrics_folder()
        self._counter_file = self._gauge_file = None
        if folder is not None:
            pid = os.getpid()
            self._counter_file = MmapedDict(str(folder / f"counter_vllmext-{pid}.db"))
            self._gauge_file = MmapedDict(str(folder / f"gauge_mostrecent_vllmext-{pid}.db"))

    def add(self, rows: dict[tuple[str, str], int]) -> None:
        """Counts rows of this step.

        Args:
            rows: number of rows by (path, reason); the path is ``sparse`` or ``dense``.
        """
        for (path, reason), num_rows in rows.items():
            if not num_rows:
                continue
            total = self._rows[path, reason] = self._rows.get((path, reason), 0) + num_rows
            if self._counter_file is not None:
                labels = {"method": self._method, "path": path, "reason": reason}
                key = mmap_key(
                    ROWS, ROWS + "_total", list(labels), list(labels.values()), ROWS_HELP
                )
                self._counter_file.write_value(key, float(total), 0.0)
        if self._gauge_file is not None:
            key = mmap_key(RATIO, RATIO, ["method"], [self._method], RATIO_HELP)
            # "mostrecent" gauges are chosen by their time stamp.
            self._gauge_file.write_value(key, self.activation_ratio, time.time())

    @property
    def activation_ratio(self) -> float:
        """Sparse rows over all decode rows so far; 0 before the first."""
        total = sum(self._rows.values())
        sparse = sum(rows for (path, _), rows in self._rows.items() if path == "sparse")
        return sparse / total if total else 0.0
