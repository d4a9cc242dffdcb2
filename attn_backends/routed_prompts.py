"""Routes of requests, from their prompts' last queries to their end (routing.py, evidence.py)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import torch

from attn_backends.evidence import Evidence, EvidenceChunk, GapWitness
from attn_backends.routing import RouteBook, Router, full_groups, is_full
from kvcache.spans import EVERYTHING_TOKENS, Span


class PromptRow(NamedTuple):
    """A row of a step whose request is known."""

    request_id: str
    prompt_tokens: int  # ``EVERYTHING_TOKENS``: asks for everything, and needs no route
    queries: range  # positions


class RoutedPrompts:
    """Watches prompts, decides a route when one ends, and keeps it until the request ends.

    Args:
        router: decides.
        span: what hides the gap.
        num_kv_heads: of each layer.
        device: of the layers.
    """

    def __init__(self, router: Router, span: Span, num_kv_heads: int, device: torch.device) -> None:
        num_layers = router.weights.shape[1]
        self._router = router
        self._evidence = Evidence(
            router.witnesses, router.evidence_tokens, span, num_layers, num_kv_heads, device
        )
        self._book = RouteBook()
        self._ending: dict[str, int] = {}  # prompts whose last token is in the step under way
        self._counts: Counter[tuple[int, str]] = Counter()

    @property
    def num_groups(self) -> int:
        """Groups of layers that are routed."""
        return self._router.num_groups

    def begin_step(self, ended_ids: Collection[str]) -> None:
        """Told of requests that ended, before the rows of a step are routed."""
        self.settle()
        self._book.forget(ended_ids)
        self._evidence.forget(ended_ids)

    def routes(self, rows: Iterable[PromptRow | None]) -> list[int]:
        """Of a step's rows; 0 of nobody's, and of prompts. Notes which prompts end."""
        return [0 if row is None else self._route(row) for row in rows]

    def _route(self, row: PromptRow) -> int:
        if row.prompt_tokens >= EVERYTHING_TOKENS:
            return 0
        route = self._book.get(row.request_id)
        if route is not None:
            return route
        if row.queries.stop > row.prompt_tokens:
            # An answer to a prompt whose end nobody saw.
            return self._decide(row.request_id, None, row.prompt_tokens)
        if row.queries.stop == row.prompt_tokens:
            self._ending[row.request_id] = row.prompt_tokens
        return 0

    def witnesses(
        self, parts: Iterable[tuple[PromptRow | None, range]]
    ) -> Mapping[int, GapWitness]:
        """What sees the evidence of a step, by layer.

        Args:
            parts: of the step's prefill rows, in order: whose, and positions of the queries.
        """
        chunks: list[EvidenceChunk] = []
        first_token = 0
        for index, (row, queries) in enumerate(parts):
            if row is not None and self._is_read(row):
                whose = row.request_id, queries, row.prompt_tokens
                chunk = self._evidence.chunk(*whose, index, first_token)
                chunks += [] if chunk is None else [chunk]
            first_token += len(queries)
        return self._evidence.witnesses(chunks)

    def _is_read(self, row: PromptRow) -> bool:
        """Whether a row's prompt is evidence still."""
        asks_for_everything = row.prompt_tokens >= EVERYTHING_TOKENS
        return not asks_for_everything and self._book.get(row.request_id) is None

    def settle(self) -> None:
        """Decides for the prompts that the last step ended; on a device, waits for it then."""
        ending, self._ending = self._ending, {}
        for request_id, prompt_tokens in ending.items():
            mass = self._evidence.take(request_id, prompt_tokens)
            self._decide(request_id, mass, prompt_tokens)

    def _decide(self, request_id: str, mass: torch.Tensor | None, prompt_tokens: int) -> int:
        """Without evidence everything is full: nothing is lost, and it is counted as such."""
        if mass is None:
            route = full_groups(self.num_groups)
        else:
            route = self._router.route(mass, prompt_tokens)
        self._book.decide(request_id, route)
        for group in range(self.num_groups):
            taken = "full" if is_full(route, group) else "sparse"
            self._counts[group, "no_evidence" if mass is None else taken] += 1
        return route

    def take_news(self) -> dict[str, int]:
        """Routes that nobody was told of yet, the last step's included."""
        self.settle()
        return self._book.take_news()

    def take_counts(self) -> Mapping[tuple[int, str], int]:
        """Routes that were decided since this was last asked, by group and way."""
        taken, self._counts = self._counts, Counter()
        return taken
