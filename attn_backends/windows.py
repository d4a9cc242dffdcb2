"""Layers whose KV heads read what a span shows them, by position alone (``LayerRole.WINDOW``).

The plan of a step, whatever the method does in its other layers. Spans are data on the device, so
that heads of one layer may differ, and the launch is the same for all.
"""

from __future__ import annotations

import torch

from attn_backends.batch import BlockSelection, SpanRule
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
from kvcache.entries import KVEntry
from kvcache.retention import KeepAll, RetentionPolicy, SpanRetention
from kvcache.spans import BETA_UNIT, Span, everything


class WindowLayers:
    """Selections and token rules of the WINDOW layers, computed for all of them at once.

    Args:
        schedule: names the layers and their spans, one per KV head.
        geometry: of the layers.
        device: of the buffers.
    """

    def __init__(self, schedule: LayerSchedule, geometry: Geometry, device: torch.device) -> None:
        rules_of = schedule.rules
        ruled = {layer: (spans, rules_of[layer]) for layer, spans in schedule.spans.items()}
        ways = list(dict.fromkeys(ruled.values()))
        kinds = [spans for spans, _ in ways]
        self._kind_of = {layer: ways.index(way) for layer, way in ruled.items()}
        self._read = {span for spans in kinds for span in spans}
        self._seen = {span for _, rule in ways for span in rule}
        self._block_size = geometry.block_size
        self._rules = [
            SpanRule.of(rule, geometry.max_num_reqs, device, len(rule) // geometry.num_kv_heads)
            for _, rule in ways
        ]
        shape = (len(kinds), geometry.max_num_reqs, geometry.num_kv_heads)
        # [kinds, 1, num_kv_heads] each
        rules = [SpanRule.of(spans, 1, torch.device("cpu")).values[:, :, 0] for spans in kinds]
        values = torch.stack(rules) if rules else torch.zeros(0, 1, 1, 4, dtype=torch.int32)
        sinks, self._floor, self._alpha, self._beta = values.to(device).unbind(3)
        width, block_size = self._width(geometry), geometry.block_size
        self._gapped = GappedRows(-(-sinks // block_size), block_size, width, device)
        self._blocks = torch.full((*shape, width), -1, dtype=torch.int32, device=device)
        self._counts = torch.zeros(shape, dtype=torch.int32, device=device)

    def _width(self, geometry: Geometry) -> int:
        """The most blocks that a head reads."""
        block_size, max_tokens = self._block_size, geometry.max_model_len
        # A window of W tokens touches at most (W - 2) // block_size + 2 blocks, wherever it starts.
        widths = (
            -(-span.sink_tokens // block_size) + (span.tokens(max_tokens) - 2) // block_size + 2
            for span in self._read
        )
        return min(max(widths, default=1), -(-max_tokens // block_size))

    def plan(self, rows: StepRows) -> dict[int, LayerPlan]:
        """By layer index, for these layers alone: sink and window blocks of each row and head."""
        if not self._rules:
            return {}
        seq_lens = rows.seq_lens[:, None]
        elastic = self._alpha + self._beta * seq_lens // BETA_UNIT
        first_seen = (seq_lens - torch.maximum(self._floor, elastic)).clamp_min(0)
        counts, blocks = self._counts[:, : len(seq_lens)], self._blocks[:, : len(seq_lens)]
        for buffer, found in zip(
            (blocks, counts), self._gapped.blocks(seq_lens, first_seen), strict=True
        ):
            buffer.copy_(found)
        plans = [
            LayerPlan(Selected(BlockSelection(*selected)), rule.rows(0, rows.num_rows))
            for *selected, rule in zip(blocks, counts, self._rules, strict=True)
        ]
        return {layer: plans[kind] for layer, kind in self._kind_of.items()}

    def hide_something(self, seq_len: int) -> bool:
        """Whether some head of some layer leaves out a part of this many tokens."""
        return not all(span.sees_everything(seq_len) for span in self._seen)


def window_entries(schedule: LayerSchedule, num_kv_heads: int) -> tuple[KVEntry, ...]:
    """What is kept where WINDOW layers free what no span shows and the others keep everything.

    Args:
        schedule: of WINDOW, DENSE and DROP layers.
        num_kv_heads: of each layer.

    Returns:
        One entry per layer; one per KV head where the heads of some layer differ, since vLLM's
        pages are equally large.
    """
    kept = {
        layer: tuple(_retention(span) for span in schedule.spans[layer])
        if layer in schedule.spans
        else (KeepAll(),) * num_kv_heads
        for layer, role in enumerate(schedule.roles)
        if role is not LayerRole.DROP
    }
    if all(len({*policies}) == 1 for policies in kept.values()):
        return tuple(KVEntry(layer, None, policies[0]) for layer, policies in kept.items())
    return tuple(
        KVEntry(layer, (head,), policy)
        for layer, policies in kept.items()
        for head, policy in enumerate(policies)
    )


def _retention(span: Span) -> RetentionPolicy:
    return KeepAll() if span == everything() else SpanRetention(span)


class WindowSelector:
    """The selector of methods that have nothing but windows, beside layers that read everything.

    Args:
        schedule: of WINDOW, DENSE and DROP layers.
        geometry: of the layers.
        device: of the buffers.
    """

    def __init__(self, schedule: LayerSchedule, geometry: Geometry, device: torch.device) -> None:
        self._windows = WindowLayers(schedule, geometry, device)
        self._dense = dict.fromkeys(schedule.of_role(LayerRole.DENSE), DENSE_LAYER)

    def plan(self, rows: StepRows) -> StepPlan:
        """See ``Selector.plan``."""
        return StepPlan({**self._dense, **self._windows.plan(rows)}, self._reasons(rows))

    def _reasons(self, rows: StepRows) -> list[RowReason]:
        if rows.seq_lens_cpu is None:
            return [RowReason.UNKNOWN_LENGTH] * rows.num_decodes
        return [
            RowReason.SELECTED
            if self._windows.hide_something(seq_len)
            else RowReason.EVERYTHING_KEPT
            for seq_len in rows.seq_lens_cpu.tolist()
        ]
