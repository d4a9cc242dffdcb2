"""What a server says of itself: its model, and the figures of its /metrics."""

from __future__ import annotations

import ipaddress
import json
import os
import socket
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families

from vllm_ext.errors import UserError
from vllm_ext.metrics import DRAFT_ROWS, ROWS

KV_USE = "vllm:kv_cache_usage_perc"
PREFIX_HITS = "vllm:prefix_cache_hits_total"
PREFIX_QUERIES = "vllm:prefix_cache_queries_total"
PREEMPTIONS = "vllm:num_preemptions_total"
_POLL_S = 0.5
RAY_LAG_S = 15.0  # Ray's port shows a figure up to that late


def require_loopback(flag: str, url: str) -> None:
    """Refuses to load a server that is not on this machine.

    Raises:
        UserError: not a http(s) address, unknown host, or a host with any other address.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"{flag} is {url!r}; it must be like http://127.0.0.1:8000")
    try:
        found = socket.getaddrinfo(parts.hostname, parts.port, proto=socket.IPPROTO_TCP)
    except OSError as error:
        raise UserError(f"{flag} {url}: {parts.hostname} is not known ({error})") from None
    for *_, address in found:
        if not ipaddress.ip_address(address[0]).is_loopback:
            raise UserError(
                f"{flag} {url} is at {address[0]}, not on this machine; a load test of a "
                "server that is yours to load needs --allow-remote"
            )


def fetch(url: str, timeout_s: float = 10.0) -> str:
    """A page of the server, with the key in ``VLLM_API_KEY`` if there is one.

    Raises:
        UserError: no answer, or an HTTP error.
    """
    request = urllib.request.Request(url)
    if key := os.environ.get("VLLM_API_KEY"):
        request.add_header("Authorization", f"Bearer {key}")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=timeout_s) as answer:
            return str(answer.read().decode())
    except urllib.error.HTTPError as error:
        hint = " (is the key in VLLM_API_KEY right?)" if error.code in (401, 403) else ""
        raise UserError(f"{url} answers HTTP {error.code}{hint}") from None
    except OSError as error:
        raise UserError(f"{url} does not answer: {error}") from None


def served_model(url: str) -> tuple[str, str]:
    """Name and root (folder or hub name) of the first model the server lists.

    Raises:
        UserError: no answer, or no model.
    """
    models: list[dict[str, Any]] = json.loads(fetch(f"{url}/v1/models")).get("data", [])
    if not models:
        raise UserError(f"{url}/v1/models lists no model")
    return models[0]["id"], models[0].get("root") or models[0]["id"]


def canonical_name(name: str) -> str:
    """The name outside Ray: ``ray_vllm_ext_x`` is ``vllm_ext:x``, ``ray_vllm_x`` is ``vllm:x``."""
    for prefix, own in (("ray_vllm_ext_", "vllm_ext:"), ("ray_vllm_", "vllm:")):
        if name.startswith(prefix):
            return own + name.removeprefix(prefix)
    return name


@dataclass
class Figures:
    """One reading of /metrics, over all engines of the endpoint.

    Attributes:
        totals: counters by name, summed.
        kv_use: share of the KV pool in use, the highest engine's; None when not exported.
        rows: decode rows, or where sparse rows only draft those, by "path reason", since the start.
    """

    totals: dict[str, float] = field(default_factory=dict)
    kv_use: float | None = None
    rows: dict[str, float] = field(default_factory=dict)

    @property
    def activation_ratio(self) -> float | None:
        """Share of the decode rows that were sparse; None where there are none of ours."""
        return _sparse_share(self.rows)


def _sparse_share(rows: dict[str, float]) -> float | None:
    num_rows = sum(rows.values())
    num_sparse = sum(value for key, value in rows.items() if key.startswith("sparse "))
    return num_sparse / num_rows if num_rows else None


def read_figures(text: str) -> Figures:
    """Parses what /metrics (the server's or Ray's) answered."""
    figures = Figures()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = canonical_name(sample.name)
            if name == KV_USE:
                figures.kv_use = max(figures.kv_use or 0.0, sample.value)
            elif name in (
                ROWS + "_total",
                DRAFT_ROWS + "_total",
            ):  # a server has the one or the other
                key = f"{sample.labels['path']} {sample.labels['reason']}"
                figures.rows[key] = figures.rows.get(key, 0.0) + sample.value
            elif name in (PREFIX_HITS, PREFIX_QUERIES, PREEMPTIONS):
                figures.totals[name] = figures.totals.get(name, 0.0) + sample.value
    return figures


def settled_figures(metrics_url: str) -> Figures:
    """A reading that has everything that has happened; on Ray's port it waits for that.

    Raises:
        UserError: no answer.
    """
    text = fetch(metrics_url)
    if "\nray_" in text:  # Ray's own figures are there before a model's first ones
        time.sleep(RAY_LAG_S)
        text = fetch(metrics_url)
    return read_figures(text)


def difference(before: Figures, after: Figures, peak_kv_use: float | None) -> dict[str, Any]:
    """What happened between two readings, for a cell's record.

    Returns:
        None for what the server does not export. ``activation_ratio`` is that of the cell's
        own rows.
    """
    grown = {key: value - before.rows.get(key, 0.0) for key, value in after.rows.items()}
    rows = {key: value for key, value in grown.items() if value}

    def delta(name: str) -> float | None:
        return after.totals[name] - before.totals.get(name, 0.0) if name in after.totals else None

    hits, queries = delta(PREFIX_HITS), delta(PREFIX_QUERIES)
    return {
        "peak_kv_use": peak_kv_use,
        "prefix_hit_share": hits / queries if hits is not None and queries else None,
        "preemptions": delta(PREEMPTIONS),
        "decode_rows": rows,
        "activation_ratio": _sparse_share(rows),
        "activation_ratio_since_start": after.activation_ratio,
    }


class Watch:
    """Reads /metrics before, during and after a cell; a context manager.

    Args:
        metrics_url: the page.
        before: a settled reading since which nothing was asked; None takes one.

    Attributes:
        after: the settled reading at the end, once ``result`` was called.
    """

    def __init__(self, metrics_url: str, before: Figures | None) -> None:
        self._url = metrics_url
        self._before = before
        self.after: Figures | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._peak: float | None = None
        self._failure: UserError | None = None

    def __enter__(self) -> Watch:
        self._before = self._before or settled_figures(self._url)
        self._thread.start()
        return self

    def _poll(self) -> None:
        while not self._stop.wait(_POLL_S):
            try:
                self._note(read_figures(fetch(self._url)).kv_use)
            except UserError as error:  # a busy server may miss one; the report says so
                self._failure = error

    def _note(self, kv_use: float | None) -> None:
        if kv_use is not None:
            self._peak = max(self._peak or 0.0, kv_use)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def result(self) -> dict[str, Any]:
        """The cell's figures; called after the context is left.

        Raises:
            UserError: /metrics no longer answers.
        """
        assert self._before is not None
        self.after = settled_figures(self._url)
        figures = difference(self._before, self.after, self._peak)
        return figures | {"metrics_failure": str(self._failure) if self._failure else None}
