"""Layers that read prompts whole, and answer within a span (``prompts_see_everything``).

Which queries are of the prompt is a matter of their position alone: a request that was preempted
computes its answer again under the span, in chunks that may begin inside the prompt. Such a chunk
is cut into two rows where the prompt ends, so that each row has one rule.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from attn_backends.batch import BlockSelection, RowCuts, SpanRule, copy_without_waiting
from attn_backends.gaps import GappedRows
from attn_backends.method import Geometry, StepRows
from attn_backends.plan import (
    DENSE_LAYER,
    LayerPlan,
    LayerRole,
    LayerSchedule,
    RowReason,
    Selected,
    StepPlan,
)
from kvcache.entries import KVEntry, layer_entries
from kvcache.retention import AfterPrompt, KeepAll
from kvcache.spans import EVERYTHING_TOKENS, everything


class _Part(NamedTuple):
    """Query tokens of a prefill row that have one rule."""

    row: int  # of the prefill rows
    queries: range  # positions
    sees_everything: bool


class AnswerWindowSelector:
    """The selector of methods that narrow answers alone, to one window in all WINDOW layers.

    What a row reads is data, a row that reads everything included: a replayed graph is right for
    every batch of its size.

    Args:
        schedule: of WINDOW and DENSE layers.
        geometry: of the layers.
        device: of the buffers.

    Raises:
        ValueError: several spans, or one that grows.
    """

    def __init__(self, schedule: LayerSchedule, geometry: Geometry, device: torch.device) -> None:
        spans = {span for heads in schedule.spans.values() for span in heads} or {everything()}
        self._span = span = spans.pop()
        if spans or span.beta_64ths:
            raise ValueError("layers that narrow answers need one window, the same for all")
        self._dense = dict.fromkeys(schedule.of_role(LayerRole.DENSE), DENSE_LAYER)
        self._windowed = schedule.of_role(LayerRole.WINDOW)
        block_size, heads = geometry.block_size, geometry.num_kv_heads
        sink_blocks = torch.tensor(-(-span.sink_tokens // block_size), dtype=torch.int32)
        rows, width = geometry.max_num_reqs, -(-geometry.max_model_len // block_size)
        self._gapped = GappedRows(sink_blocks.to(device), block_size, width, device)
        self._selection = BlockSelection.empty((rows, heads, width), device)
        self._dense_until = torch.zeros(rows, dtype=torch.int32, device=device)
        # A prefill row may have two parts.
        self._rules = SpanRule.of((everything(),) * heads, 2 * rows, device).values
        self._everything = self._rules[:1].clone()
        self._narrow = SpanRule.of((span,) * heads, 1, device).values

    def plan(self, rows: StepRows) -> StepPlan:
        """See ``Selector.plan``.

        Raises:
            RuntimeError: it is not told where queries of a prefill row stand.
        """
        num_decodes = rows.num_decodes
        dense_until = _limits(rows)
        sees_everything = self._decode(rows.seq_lens, dense_until)
        parts = list(_parts(rows))
        is_plain = all(part.sees_everything for part in parts)
        num_rules = num_decodes + (rows.num_rows - num_decodes if is_plain else len(parts))
        rules = self._rules[:num_rules]
        rules[:num_decodes] = torch.where(
            sees_everything[:, None, None], self._everything, self._narrow
        )
        cuts = None
        if not is_plain:
            cuts = self._cuts(parts)
            whole = [part.sees_everything for part in parts]
            rules[num_decodes:] = torch.where(
                self._on_device(whole, torch.bool)[:, None, None], self._everything, self._narrow
            )
        narrowed = LayerPlan(
            Selected(self._selection.rows(0, num_decodes)),
            SpanRule(rules),
            is_prefill_plain=is_plain,
        )
        layers = {**self._dense, **dict.fromkeys(self._windowed, narrowed)}
        return StepPlan(layers, self._reasons(rows, dense_until), cuts=cuts)

    def _decode(self, seq_lens: torch.Tensor, dense_until: Sequence[int]) -> torch.Tensor:
        """Writes the selection of the decode rows.

        Returns:
            ``[num_decodes]`` bool: whether each reads everything.
        """
        limits = self._dense_until[: len(seq_lens)]
        copy_without_waiting(torch.tensor(dense_until, dtype=torch.int32), limits)
        sees_everything = seq_lens <= limits
        first_seen = (seq_lens - self._span.floor_tokens).clamp_min(0)
        first_seen.masked_fill_(sees_everything, 0)
        logical, counts = self._gapped.blocks(seq_lens, first_seen)
        selection = self._selection.rows(0, len(seq_lens))
        selection.logical_blocks.copy_(logical[:, None])
        selection.counts.copy_(counts[:, None])
        return sees_everything

    def _cuts(self, parts: Sequence[_Part]) -> RowCuts:
        starts = [0]
        for part in parts:
            starts.append(starts[-1] + len(part.queries))
        return RowCuts(
            self._on_device([part.row for part in parts], torch.int64),
            self._on_device(starts, torch.int32),
            self._on_device([part.queries.stop for part in parts], torch.int32),
        )

    def _on_device(self, values: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        into = torch.empty(len(values), dtype=dtype, device=self._rules.device)
        copy_without_waiting(torch.tensor(values, dtype=dtype), into)
        return into

    def _reasons(self, rows: StepRows, dense_until: Sequence[int]) -> list[RowReason]:
        if rows.seq_lens_cpu is None:
            return [RowReason.UNKNOWN_LENGTH] * rows.num_decodes
        lengths = rows.seq_lens_cpu.tolist()
        return [self._reason(*known) for known in zip(lengths, dense_until, strict=True)]

    def _reason(self, seq_len: int, dense_until: int) -> RowReason:
        if not self._windowed:
            return RowReason.NO_SPARSE_LAYERS
        if dense_until >= EVERYTHING_TOKENS:
            return RowReason.REQUEST_OFF
        hides = not self._span.sees_everything(seq_len)
        return RowReason.SELECTED if hides else RowReason.EVERYTHING_KEPT


def _limits(rows: StepRows) -> list[int]:
    """Of the decode rows, from where on spans hold. A row that is nobody's has its span, so that
    nothing is read that may be freed, unless its token is known to be of a prompt.
    """
    limits = [0] * rows.num_decodes
    for row in rows.prompt_rows:
        limits[row] = EVERYTHING_TOKENS
    for row, known in enumerate(rows.dense_until[: rows.num_decodes]):
        if known is not None:
            limits[row] = known
    return limits


def _parts(rows: StepRows) -> Iterator[_Part]:
    """The prefill rows' queries, cut where spans begin to hold; rows of nobody see everything."""
    limits = rows.dense_until[rows.num_decodes :]
    if not rows.prefill_queries:
        if any(limit is not None for limit in limits):
            raise RuntimeError("nobody says where the queries of prefill rows stand")
        return
    for row, queries in enumerate(rows.prefill_queries):
        limit = limits[row] if row < len(limits) else None
        cut = queries.stop if limit is None else min(max(limit, queries.start), queries.stop)
        if queries.start < cut:
            yield _Part(row, range(queries.start, cut), True)
        if cut < queries.stop:
            yield _Part(row, range(cut, queries.stop), False)


def answer_entries(schedule: LayerSchedule, frees: bool) -> tuple[KVEntry, ...]:
    """What is kept; nothing generated serves a later prompt, in no layer.

    Args:
        schedule: of WINDOW, DENSE and DROP layers.
        frees: whether WINDOW layers free behind the prompt what no answer sees.
    """
    kept = KeepAll(caches_generated=False)
    policies = [
        AfterPrompt(schedule.spans[layer][0]) if frees and layer in schedule.spans else kept
        for layer in range(len(schedule.roles))
    ]
    return layer_entries(policies, schedule.dropped)
