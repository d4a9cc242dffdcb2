"""Decode rows by path and reason, for /metrics."""

from __future__ import annotations

import math

from attn_backends.recall import BOUNDS, RecallWatch
from kvcache.adapter.figures import figure_files

ROWS = "vllm_ext:decode_rows"
ROWS_HELP = "Decode rows served, by method, path (sparse or dense) and reason."
RATIO = "vllm_ext:activation_ratio"
RECALL = "vllm_ext:selection_recall"
RECALL_HELP = (
    "Attention mass that selections cover, moving average over rows. own: the worst anchor's own "
    "selection; inherited: the one before, at the worst anchor; served: relative to the "
    "best choice, of the worst head of all reuse layers, of checked rows."
)
RECALL_HISTOGRAM = "vllm_ext:selection_recall_hist"
RECALL_HISTOGRAM_HELP = "Attention mass that selections cover, per sparse decode row."
AUDITED = ("vllm_ext:audit_rows", "Sparse decode rows that were computed densely as well.")
AUDIT_KL = (
    "vllm_ext:audit_kl_sum",
    "Sum over audited rows of the KL divergence of their next token from dense, nats.",
)
AUDIT_AGREEMENTS = (
    "vllm_ext:audit_agreements",
    "Audited rows whose most likely next token was also the dense one.",
)
AUDIT_BYTES = (
    "vllm_ext:audit_kv_bytes_saved",
    "Bytes of keys and values that dense would have read and the audited rows did not.",
)
GUARD = "vllm_ext:guard_requests"
GUARD_HELP = "Requests whose recall stayed below the floor, by what the guard did."
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

    def show_recall(self, watch: RecallWatch) -> None:
        """Writes what the watch knows, nothing before the first sparse row."""
        if self._files is None or not watch.ema:
            return
        method = {"method": self._method}
        for kind, value in watch.ema.items():
            labels = method | {"kind": kind}
            self._files.set_gauge(RECALL, RECALL_HELP, labels, value)
            counts = dict(zip((*BOUNDS, math.inf), watch.histograms[kind], strict=True))
            self._files.set_histogram(
                RECALL_HISTOGRAM, RECALL_HISTOGRAM_HELP, labels, counts, watch.sums[kind]
            )
        for action, total in watch.actions.items():
            self._files.set_counter(GUARD, GUARD_HELP, method | {"action": action}, total)

    @property
    def activation_ratio(self) -> float:
        """Sparse rows over all decode rows so far; 0 before the first."""
        total = sum(self._rows.values())
        sparse = sum(rows for (path, _), rows in self._rows.items() if path == "sparse")
        return sparse / total if total else 0.0


class AuditFigures:
    """Sums of what the shadow audit found."""

    def __init__(self, method: str) -> None:
        self._labels = {"method": method}
        self._files = figure_files()
        self.rows = 0
        self.kl_sum = 0.0
        self.agreements = 0
        self.kv_bytes_saved = 0  # less than 0 while more was read twice than was left out
        self._shown_bytes = 0

    def add(self, divergences: list[float], agrees: list[bool], kv_bytes_saved: int) -> None:
        """Counts audited rows.

        Args:
            divergences: nats, by row.
            agrees: by row.
            kv_bytes_saved: of these rows.
        """
        self.rows += len(divergences)
        self.kl_sum += sum(divergences)
        self.agreements += sum(agrees)
        self.kv_bytes_saved += kv_bytes_saved
        self._shown_bytes = max(self._shown_bytes, self.kv_bytes_saved)  # a counter never falls
        if self._files is None:
            return
        for (name, text), total in (
            (AUDITED, self.rows),
            (AUDIT_KL, self.kl_sum),
            (AUDIT_AGREEMENTS, self.agreements),
            (AUDIT_BYTES, self._shown_bytes),
        ):
            self._files.set_counter(name, text, self._labels, total)
