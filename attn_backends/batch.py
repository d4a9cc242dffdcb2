"""The plain-tensor vocabulary that methods, plans and ops share. No vLLM here.

Index spaces: a *logical* block is the n-th block of a request, a *physical* block is a
row of the cache; ``block_table[request, logical_block]`` is the physical one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from kvcache.spans import BETA_UNIT, Span


@dataclass(frozen=True, eq=False)
class PagedBatch:
    """Rows (requests) of one step over a paged KV cache; equal to itself alone.

    Query tokens of row ``r`` are ``query_start_loc[r]:query_start_loc[r + 1]``; they are
    the *last* tokens of the row's ``seq_lens[r]`` tokens, whose keys and values are
    already in the cache.
    """

    query_start_loc: torch.Tensor  # [num_reqs + 1] int32
    seq_lens: torch.Tensor  # [num_reqs] int32, tokens including this step's
    block_table: torch.Tensor  # [num_reqs, max_blocks] int32, logical -> physical
    num_reqs: int
    num_tokens: int
    max_query_len: int
    max_seq_len: int  # may be an upper bound

    def rows(self, first: int, last: int, first_token: int, last_token: int) -> PagedBatch:
        """The half-open row range ``[first, last)`` as a batch of its own.

        The caller slices query and output to tokens ``[first_token, last_token)``;
        ``query_start_loc`` is rebased to that slice; all else are views.
        """
        starts = self.query_start_loc[first : last + 1]
        return PagedBatch(
            query_start_loc=starts - first_token if first_token else starts,
            seq_lens=self.seq_lens[first:last],
            block_table=self.block_table[first:last],
            num_reqs=last - first,
            num_tokens=last_token - first_token,
            max_query_len=self.max_query_len,
            max_seq_len=self.max_seq_len,
        )

    def decode_rows(self, rows: torch.Tensor) -> PagedBatch:
        """Some rows of a batch of decode rows (one query token each), in the order given.

        Args:
            rows: ``[n]`` int64.
        """
        num_rows = len(rows)
        return PagedBatch(
            query_start_loc=self.query_start_loc[: num_rows + 1],
            seq_lens=self.seq_lens[rows],
            block_table=self.block_table[rows],
            num_reqs=num_rows,
            num_tokens=num_rows,
            max_query_len=self.max_query_len,
            max_seq_len=self.max_seq_len,
        )


@dataclass(frozen=True)
class RowCuts:
    """Parts of rows, each of which a step serves as a row of its own: some query tokens of a row
    may follow another rule than those before them.
    """

    rows: torch.Tensor  # [num_parts] int64: the row of each part, ascending
    query_start_loc: torch.Tensor  # [num_parts + 1] int32
    seq_lens: torch.Tensor  # [num_parts] int32, tokens up to the part's last query

    def of(self, batch: PagedBatch) -> PagedBatch:
        """The parts of this batch's rows as a batch, of the same query tokens in the same order."""
        return replace(
            batch,
            query_start_loc=self.query_start_loc,
            seq_lens=self.seq_lens,
            block_table=batch.block_table[self.rows],
            num_reqs=len(self.rows),
        )


@dataclass(frozen=True)
class SpanRule:
    """Which tokens a query may attend: a ``Span`` per row and KV head, or per row and query head.

    It is a rule about tokens and positions, so chunking, batching and block size cannot change
    it. Kernels compute in int32: exact for positions below 2^25.
    """

    # [num_reqs, num_kv_heads, num_spans, 4] int32, contiguous: sink_tokens, floor_tokens,
    # alpha_tokens, beta_64ths; num_spans is 1, or one for each query head of a KV head's group
    values: torch.Tensor
    span: Span | None = None  # what all rows and heads have; None: they differ, or nobody knows

    @classmethod
    def of(
        cls, spans: Sequence[Span], num_reqs: int, device: torch.device, num_spans: int = 1
    ) -> SpanRule:
        """The same in all rows.

        Args:
            spans: of each KV head, ``num_spans`` side by side.
            num_reqs: rows.
            device: of the values.
            num_spans: 1, or the query heads of a group.
        """
        heads = [(s.sink_tokens, s.floor_tokens, s.alpha_tokens, s.beta_64ths) for s in spans]
        values = torch.tensor(heads, dtype=torch.int32, device=device).view(1, -1, num_spans, 4)
        return cls(values.repeat(num_reqs, 1, 1, 1), spans[0] if len({*spans}) == 1 else None)

    def rows(self, first: int, last: int) -> SpanRule:
        """The rule of rows ``[first, last)``."""
        return SpanRule(self.values[first:last], self.span)

    def sees(
        self, row: int, head: int, positions: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        """Whether queries at ``positions`` see ``tokens`` at or before them; int64.

        Returns:
            ``[num_spans, ...]``, of a KV head's spans; positions and tokens broadcast.
        """
        values = self.values[row, head].long().unbind(1)
        others = [1] * max(tokens.ndim, positions.ndim)
        sink, floor, alpha, beta = (value.view(-1, *others) for value in values)
        spans = torch.maximum(floor, alpha + beta * (positions + 1) // BETA_UNIT)
        return (tokens < sink) | (tokens > positions - spans)


@dataclass(frozen=True)
class RowOptions:
    """What a request asked for itself, against the server's settings."""

    is_dense: bool = False
    budget_tokens: int | None = None
    budget_factor: float = 1.0  # on the server's budget, where budget_tokens is None
    is_guarded: bool = False  # changed by the recall guard (recall.py)


@dataclass(frozen=True)
class BlockSelection:
    """Logical blocks that each (decode row, KV head) reads.

    Entries are ascending and distinct; the last block of a row, which holds the current
    token, is always among them; blocks that later queries will read may follow it. Padding is -1.
    """

    logical_blocks: torch.Tensor  # [num_reqs, num_kv_heads, max_selected] int32
    counts: torch.Tensor  # [num_reqs, num_kv_heads] int32
    # [num_kv_heads] int64: whose entries each KV head of the layer reads; None: those of its index
    heads: torch.Tensor | None = None

    @classmethod
    def empty(cls, shape: tuple[int, int, int], device: torch.device) -> BlockSelection:
        """Buffers of ``[rows, num_kv_heads, width]`` that select nothing."""
        blocks = torch.full(shape, -1, dtype=torch.int32, device=device)
        return cls(blocks, torch.zeros(shape[:2], dtype=torch.int32, device=device))

    def rows(self, first: int, last: int) -> BlockSelection:
        """The selection of rows ``[first, last)``; views."""
        blocks, counts = self.logical_blocks[first:last], self.counts[first:last]
        return replace(self, logical_blocks=blocks, counts=counts)


def copy_without_waiting(values: torch.Tensor, into: torch.Tensor) -> None:
    """Whatever device either is on; torch keeps pinned memory until it has been read."""
    if into.is_cuda and not values.is_cuda and len(values):
        values = values.pin_memory()
    into.copy_(values, non_blocking=True)
