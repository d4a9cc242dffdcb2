"""Decode rows by path and reason, for /metrics."""

from __future__ import annotations

from kvcache.adapter.figures import figure_files

ROWS = "vllm_ext:decode_rows"
ROWS_HELP = "Decode rows served, by method, path (sparse or dense) and reason."
RATIO = "vllm_ext:activation_ratio"
RATIO_HELP = "Share of decode rows served by the sparse path since the start."


class RowCounters:
    """Counts decode rows of one worker."""

    def __init__(self, method: str) -> None:
        self._method = method
        self._rows: dict[tuple[str, str], int] = {}
        self._files = figure_files()

    def add(self, rows: dict[tuple[str, str], int]) -> None:
        """Counts rows of this step.

        Args:
            rows: number of rows by (path, reason); the path is ``sparse`` or ``dense``.
        """
        for (path, reason), num_rows in rows.items():
            if not num_rows:
                continue
            total = self._rows[path, reason] = self._rows.get((path, reason), 0) + num_rows
            if self._files is not None:
                labels = {"method": self._method, "path": path, "reason": reason}
                self._files.set_counter(ROWS, ROWS_HELP, labels, total)
        if self._files is not None:
            labels = {"method": self._method}
            self._files.set_gauge(RATIO, RATIO_HELP, labels, self.activation_ratio)

    @property
    def activation_ratio(self) -> float:
        """Sparse rows over all decode rows so far; 0 before the first."""
        total = sum(self._rows.values())
        sparse = sum(rows for (path, _), rows in self._rows.items() if path == "sparse")
        return sparse / total if total else 0.0
