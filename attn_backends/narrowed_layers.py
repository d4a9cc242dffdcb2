"""Layers that read an answer's sinks and window, and what of them is data: one set of buffers for
layers that a request's route decides together (answer_windows.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from attn_backends.batch import BlockSelection, SpanRule, copy_without_waiting
from attn_backends.gaps import GappedRows
from attn_backends.method import Geometry, StepRows
from attn_backends.plan import LayerPlan, Selected
from attn_backends.routing import is_full
from kvcache.spans import EVERYTHING_TOKENS, Span, everything


class RowPart(NamedTuple):
    """Query tokens of a prefill row that have one rule."""

    row: int  # of the prefill rows
    queries: range  # positions
    sees_everything: bool


class NarrowedLayers:
    """Layers with one window, and one way for each row.

    Args:
        layers: by index.
        group: of the route, whose bit makes a row read everything; None: no route does.
        span: what answers see; a plain window.
        geometry: of the layers.
        device: of the buffers.
    """

    def __init__(
        self,
        layers: tuple[int, ...],
        group: int | None,
        span: Span,
        geometry: Geometry,
        device: torch.device,
    ) -> None:
        self.layers, self._group, self._span = layers, group, span
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

    def is_full(self, route: int) -> bool:
        """Whether the layers read everything under a route."""
        return self._group is not None and is_full(route, self._group)

    def plan(
        self,
        rows: StepRows,
        dense_until: Sequence[int],
        parts: Sequence[RowPart] | None,
        routes: Sequence[int],
    ) -> LayerPlan:
        """The layers' plan of a step.

        Args:
            rows: of the step.
            dense_until: of the decode rows: from where on spans hold.
            parts: of the prefill rows, where they are cut; None: all see everything.
            routes: of all rows; empty where nobody routes.
        """
        num_decodes = rows.num_decodes
        limits = [
            EVERYTHING_TOKENS if routes and self.is_full(routes[row]) else limit
            for row, limit in enumerate(dense_until)
        ]
        sees_everything = self._decode(rows.seq_lens, limits)
        whole = [
            part.sees_everything or bool(routes and self.is_full(routes[num_decodes + part.row]))
            for part in parts or ()
        ]
        num_prefills = rows.num_rows - num_decodes if parts is None else len(parts)
        rules = self._rules[: num_decodes + num_prefills]
        rules[:num_decodes] = self._ruled(sees_everything)
        is_plain = all(whole)
        if not is_plain:
            rules[num_decodes:] = self._ruled(on_device(whole, torch.bool, rules.device))
        selection = self._selection.rows(0, num_decodes)
        return LayerPlan(Selected(selection), SpanRule(rules), is_prefill_plain=is_plain)

    def _ruled(self, sees_everything: torch.Tensor) -> torch.Tensor:
        return torch.where(sees_everything[:, None, None, None], self._everything, self._narrow)

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


def on_device(values: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A small tensor, without waiting for the device."""
    into = torch.empty(len(values), dtype=dtype, device=device)
    copy_without_waiting(torch.tensor(values, dtype=dtype), into)
    return into
