"""Decode rows by path and reason, for /metrics."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping

from attn_backends.recall import BOUNDS, RecallWatch
from kvcache.adapter.figures import figure_files

ROWS = "vllm_ext:decode_rows"
ROWS_HELP = "Decode rows served, by method, path (sparse or dense) and reason."
DRAFT_ROWS = "vllm_ext:draft_rows"
DRAFT_ROWS_HELP = (
    "Rows of steps after which lossless mode drafts, by method, path (sparse, dense, or none: no "
    "row of the batch would leave anything out) and reason."
)
VERIFY_ROWS = "vllm_ext:verify_rows"
VERIFY_ROWS_HELP = "Rows that lossless mode verified densely, with drafts or without, by method."
RECALL = "vllm_ext:selection_recall"
RECALL_HELP = (
    "Attention mass that selections cover, moving average over an engine's rows. own: the worst "
    "anchor's own selection; inherited: the one before, at the worst anchor; served: relative to "
    "the best choice, of the worst head of all reuse layers, of checked rows."
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
ROUTES = "vllm_ext:routes"
ROUTES_HELP = (
    "Requests by what their route says of a group of layers: full, sparse, or no_evidence (full, "
    "since queries of the prompt's end were not seen)."
)
GUARD = "vllm_ext:guard_requests"
GUARD_HELP = "Requests whose recall stayed below the floor, by what the guard did."


class RowCounters:
    """Counts decode rows of one worker, and what its recall watch finds out.

    Args:
        method: the backend's name.
        engine: number of the data-parallel engine, as in vLLM's own metrics.
    """

    def __init__(self, method: str, engine: int = 0) -> None:
        self._method = {"method": method}
        self._engine = {"engine": str(engine)}
        self._files = figure_files()

    def add(self, rows: Mapping[tuple[str, str], int]) -> None:
        """Counts rows of this step.

        Args:
            rows: number of rows by (path, reason); the path is ``sparse`` or ``dense``.
        """
        for labels, num_rows in self._labelled(rows):
            if self._files is not None:
                self._files.add_to_counter(ROWS, ROWS_HELP, labels, num_rows)

    def add_routes(self, routes: Mapping[tuple[int, str], int]) -> None:
        """Counts requests whose route was decided.

        Args:
            routes: number of requests by (group of layers, route).
        """
        if self._files is None:
            return
        for (group, route), requests in routes.items():
            labels = self._method | {"group": str(group), "route": route}
            self._files.add_to_counter(ROUTES, ROUTES_HELP, labels, requests)

    def add_drafted(self, rows: Mapping[tuple[str, str], int]) -> None:
        """Counts rows that drafted in this step.

        Args:
            rows: number of rows by (path, reason); the path is ``sparse``, ``dense``, or ``none``
                where the whole batch had nothing to leave out and did not draft.
        """
        for labels, num_rows in self._labelled(rows):
            if self._files is not None:
                self._files.add_to_counter(DRAFT_ROWS, DRAFT_ROWS_HELP, labels, num_rows)

    def add_verified(self, num_rows: int) -> None:
        """Counts rows that the dense pass of this step verified."""
        if self._files is not None and num_rows:
            self._files.add_to_counter(VERIFY_ROWS, VERIFY_ROWS_HELP, self._method, num_rows)

    def _labelled(
        self, rows: Mapping[tuple[str, str], int]
    ) -> Iterator[tuple[dict[str, str], int]]:
        """Labels and number of those that there are."""
        for (path, reason), num_rows in rows.items():
            if num_rows:
                yield self._method | {"path": path, "reason": reason}, num_rows

    def show_recall(self, watch: RecallWatch) -> None:
        """Writes what the watch learned since this was last called."""
        if self._files is None or not watch.ema:
            return
        for kind, value in watch.ema.items():
            labels = self._method | {"kind": kind}
            self._files.set_gauge(RECALL, RECALL_HELP, labels | self._engine, value)
            counts = {
                bound: int(_growth(watch, (kind, bound), count))
                for bound, count in zip((*BOUNDS, math.inf), watch.histograms[kind], strict=True)
            }
            total = _growth(watch, (kind, "sum"), watch.sums[kind])
            self._files.add_to_histogram(
                RECALL_HISTOGRAM, RECALL_HISTOGRAM_HELP, labels, counts, total
            )
        for action, requests in watch.actions.items():
            labels = self._method | {"action": action}
            growth = _growth(watch, action, requests)
            self._files.add_to_counter(GUARD, GUARD_HELP, labels, growth)


def _growth(watch: RecallWatch, name: Hashable, total: float) -> float:
    growth = total - watch.shown.get(name, 0.0)
    watch.shown[name] = total
    return growth


class AuditFigures:
    """Sums of what the shadow audit found."""

    def __init__(self, method: str) -> None:
        self._labels = {"method": method}
        self._files = figure_files()
        self._unshown_bytes = 0  # saved, less what was read twice; shown once it is more than 0

    def add(self, divergences: list[float], agrees: list[bool], kv_bytes_saved: int) -> None:
        """Counts audited rows.

        Args:
            divergences: nats, by row.
            agrees: by row.
            kv_bytes_saved: of these rows; negative where more was read twice than left out.
        """
        if self._files is None:
            return
        self._unshown_bytes += kv_bytes_saved
        saved_bytes = max(0, self._unshown_bytes)  # a counter never falls
        self._unshown_bytes -= saved_bytes
        for (name, text), amount in (
            (AUDITED, len(divergences)),
            (AUDIT_KL, sum(divergences)),
            (AUDIT_AGREEMENTS, sum(agrees)),
            (AUDIT_BYTES, saved_bytes),
        ):
            self._files.add_to_counter(name, text, self._labels, amount)
