"""What prompts attended between sinks and window: the evidence that requests are routed by.

A query's mass does not depend on the other queries of its step, so that sums over the last queries
of a prompt are the same, up to rounding, however it was chunked and beside whatever else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from attn_backends.batch import PagedBatch
from kvcache.spans import Span

PIECE_TOKENS = 1024  # keys that are gathered at once


def gap_mass(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    block_table: torch.Tensor,
    first_position: int,
    scale: float,
    span: Span,
) -> torch.Tensor:
    """Attention mass that queries of one row put on tokens that the span would hide from them.

    Args:
        query: ``[n, num_heads, head_size]``, of the positions from ``first_position`` on.
        key_cache: ``[num_blocks, num_kv_heads, block_size, head_size]``; keys of the last query
            are in it.
        block_table: ``[max_blocks]``, of the row.
        first_position: 0 or more.
        scale: of the scores.
        span: a plain window.

    Returns:
        ``[num_kv_heads]`` fp32: sums over the queries, means over a KV head's query heads.
    """
    num_queries, num_heads, head_size = query.shape
    _, num_kv_heads, block_size, _ = key_cache.shape
    num_tokens, group = first_position + num_queries, num_heads // num_kv_heads
    if span.sees_everything(num_tokens):
        return torch.zeros(num_kv_heads, device=query.device)
    folded = (query.float() * scale).view(num_queries, num_kv_heads, group, head_size)
    folded = folded.permute(1, 0, 2, 3).reshape(num_kv_heads, num_queries * group, head_size)
    positions = torch.arange(first_position, num_tokens, device=query.device)
    positions = positions.repeat_interleave(group)[:, None]
    total = folded.new_full(folded.shape[:2], -torch.inf)
    hidden = total.clone()  # logarithms of sums, both
    num_blocks = -(-num_tokens // block_size)
    sink_blocks = -(-span.sink_tokens // block_size)
    hidden_blocks = max(sink_blocks, (first_position - span.floor_tokens + 1) // block_size)
    for first, last in _pieces((0, sink_blocks, hidden_blocks, num_blocks), block_size):
        keys = key_cache[block_table[first:last].long()].transpose(0, 1).flatten(1, 2).float()
        scores = torch.bmm(folded, keys.transpose(1, 2))
        if sink_blocks <= first and last <= hidden_blocks:  # from all queries
            sums = scores.logsumexp(-1)
            total, hidden = torch.logaddexp(total, sums), torch.logaddexp(hidden, sums)
            continue
        tokens = torch.arange(first * block_size, last * block_size, device=query.device)
        scores.masked_fill_(tokens > positions, -torch.inf)
        total = torch.logaddexp(total, scores.logsumexp(-1))
        is_seen = (tokens < span.sink_tokens) | (tokens > positions - span.floor_tokens)
        hidden = torch.logaddexp(hidden, scores.masked_fill_(is_seen, -torch.inf).logsumexp(-1))
    return (hidden - total).exp().sum(1) / group


def _pieces(bounds: Sequence[int], block_size: int) -> Iterator[tuple[int, int]]:
    """Blocks between these bounds, ``PIECE_TOKENS`` at once or fewer."""
    step = max(1, PIECE_TOKENS // block_size)
    for start, stop in pairwise(min(bound, bounds[-1]) for bound in bounds):
        for first in range(start, stop, step):
            yield first, min(first + step, stop)


@dataclass(frozen=True)
class EvidenceChunk:
    """Queries of one prompt in one step.

    Attributes:
        row: of the step's prefill rows, or of their parts where they are cut.
        tokens: of the step's prefill tokens.
        first_position: of the first query.
        sums: ``[num_witnesses, num_kv_heads]``, which grow by their mass.
    """

    row: int
    tokens: slice
    first_position: int
    sums: torch.Tensor


@dataclass(frozen=True)
class GapWitness:
    """One layer's: see ``plan.PrefillWitness``.

    Attributes:
        index: of the layer among the witnesses.
        span: what hides the gap.
        chunks: of this step.
    """

    index: int
    span: Span
    chunks: Sequence[EvidenceChunk]

    def __call__(
        self, query: torch.Tensor, key_cache: torch.Tensor, batch: PagedBatch, scale: float
    ) -> None:
        """Adds what the chunks' queries attended in the gap."""
        for chunk in self.chunks:
            chunk.sums[self.index] += gap_mass(
                query[chunk.tokens],
                key_cache,
                batch.block_table[chunk.row],
                chunk.first_position,
                scale,
                self.span,
            )


@dataclass
class _Sums:
    """Of one prompt that is being read."""

    sums: torch.Tensor
    stop: int  # positions before it, from the first evidence query on, are in the sums


class Evidence:
    """Sums of gap mass, by request, while its prompt's last queries are computed.

    Args:
        layers: the witnesses.
        num_tokens: last queries of a prompt that are evidence.
        span: what hides the gap.
        num_layers: of the model.
        num_kv_heads: of each layer.
        device: of the layers.
    """

    def __init__(
        self,
        layers: Sequence[int],
        num_tokens: int,
        span: Span,
        num_layers: int,
        num_kv_heads: int,
        device: torch.device,
    ) -> None:
        self._layers, self._num_tokens, self._span = tuple(layers), num_tokens, span
        self._shape = (num_layers, num_kv_heads)
        self._device = device
        self._by_id: dict[str, _Sums] = {}

    def chunk(
        self, request_id: str, queries: range, prompt_tokens: int, row: int, first_token: int
    ) -> EvidenceChunk | None:
        """What of a row's queries is evidence. A row that begins anew, after a preemption, begins
        its sums anew; where queries were computed that no witness saw, there is no evidence.

        Args:
            request_id: of the row.
            queries: their positions.
            prompt_tokens: of the request.
            row: see ``EvidenceChunk``.
            first_token: of the row, among the step's prefill tokens.
        """
        first = max(0, prompt_tokens - self._num_tokens)
        wanted = range(max(queries.start, first), min(queries.stop, prompt_tokens))
        if not self._layers or not wanted:
            return None
        known = self._by_id.pop(request_id, None)
        if wanted.start == first:
            sums = torch.zeros(len(self._layers), self._shape[1], device=self._device)
            known = _Sums(sums, first)
        if known is None or known.stop != wanted.start:
            return None
        self._by_id[request_id] = _Sums(known.sums, wanted.stop)
        start = first_token + wanted.start - queries.start
        return EvidenceChunk(row, slice(start, start + len(wanted)), wanted.start, known.sums)

    def witnesses(self, chunks: Sequence[EvidenceChunk]) -> Mapping[int, GapWitness]:
        """By layer; empty where a step has no evidence."""
        if not chunks:
            return {}
        return {
            layer: GapWitness(index, self._span, chunks) for index, layer in enumerate(self._layers)
        }

    def take(self, request_id: str, prompt_tokens: int) -> torch.Tensor | None:
        """A read prompt's evidence, on the host: waits for the device.

        Returns:
            ``[num_layers, num_kv_heads]``, means over the queries, 0 in layers that are no
            witnesses; None where queries are missing.
        """
        mass = torch.zeros(self._shape)
        if not self._layers:
            return mass
        known = self._by_id.pop(request_id, None)
        if known is None or known.stop != prompt_tokens:
            return None
        mass[list(self._layers)] = known.sums.cpu() / min(self._num_tokens, prompt_tokens)
        return mass

    def forget(self, request_ids: Iterable[str]) -> None:
        """Requests ended."""
        for request_id in request_ids:
            self._by_id.pop(request_id, None)
