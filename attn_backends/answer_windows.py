"""Layers that read prompts whole, and answer within a span (``prompts_see_everything``).

Which queries are of the prompt is a matter of their position alone: a request that was preempted
computes its answer again under the span, in chunks that may begin inside the prompt. Such a chunk
is cut into two rows where the prompt ends, so that each row has one rule.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from attn_backends.batch import RowCuts
from attn_backends.method import Geometry, StepRows
from attn_backends.narrowed_layers import NarrowedLayers, RowPart, on_device
from attn_backends.plan import (
    DENSE_LAYER,
    LayerRole,
    LayerSchedule,
    PrefillWitness,
    RowReason,
    StepPlan,
)
from attn_backends.routed_prompts import PromptRow, RoutedPrompts
from attn_backends.routing import Router
from kvcache.entries import KVEntry, layer_entries
from kvcache.retention import AfterPrompt, KeepAll
from kvcache.spans import EVERYTHING_TOKENS, everything


class AnswerWindowSelector:
    """The selector of methods that narrow answers alone, to one window in all WINDOW layers, those
    apart that a request's route makes full.

    What a row reads is data, a row that reads everything included: a replayed graph is right for
    every batch of its size.

    Args:
        schedule: of WINDOW and DENSE layers.
        geometry: of the layers.
        device: of the buffers.
        router: of the schedule's ``routed_groups``; None where there are none.

    Raises:
        ValueError: several spans, or one that grows.
    """

    def __init__(
        self,
        schedule: LayerSchedule,
        geometry: Geometry,
        device: torch.device,
        router: Router | None = None,
    ) -> None:
        spans = {span for heads in schedule.spans.values() for span in heads} or {everything()}
        self._span = span = spans.pop()
        if spans or span.beta_64ths:
            raise ValueError("layers that narrow answers need one window, the same for all")
        routed = schedule.routed_groups
        self._prompts = (
            None if router is None else RoutedPrompts(router, span, geometry.num_kv_heads, device)
        )
        self._device = device
        self._dense = dict.fromkeys(schedule.of_role(LayerRole.DENSE), DENSE_LAYER)
        windowed = {*schedule.of_role(LayerRole.WINDOW)}.difference(*routed)
        sets = [(tuple(sorted(windowed)), None), *((group, i) for i, group in enumerate(routed))]
        self._narrowed = [
            NarrowedLayers(layers, group, span, geometry, device)
            for layers, group in sets
            if layers
        ]

    def plan(self, rows: StepRows) -> StepPlan:
        """See ``Selector.plan``.

        Raises:
            RuntimeError: it is not told where queries of a prefill row stand.
        """
        dense_until = _limits(rows)
        parts = list(_parts(rows))
        is_cut = not all(part.sees_everything for part in parts)
        routes, witnesses = self._routes(rows, parts)
        layers = dict(self._dense)
        for narrowed in self._narrowed:
            plan = narrowed.plan(rows, dense_until, parts if is_cut else None, routes)
            layers |= dict.fromkeys(narrowed.layers, plan)
        for layer, witness in witnesses.items():
            layers[layer] = replace(layers[layer], witness=witness)
        return StepPlan(
            layers,
            self._reasons(rows, dense_until, routes),
            cuts=self._cuts(parts) if is_cut else None,
            prompts=self._prompts,
        )

    def _routes(
        self, rows: StepRows, parts: Sequence[RowPart]
    ) -> tuple[Sequence[int], Mapping[int, PrefillWitness]]:
        """Of all rows, and who watches prompts in this step."""
        if self._prompts is None:
            return (), {}
        self._prompts.begin_step(rows.ended_ids)
        known = list(_prompt_rows(rows))
        routes = self._prompts.routes(known)
        own = ((known[rows.num_decodes + part.row], part.queries) for part in parts)
        return routes, self._prompts.witnesses(own)

    def _cuts(self, parts: Sequence[RowPart]) -> RowCuts:
        starts = [0]
        for part in parts:
            starts.append(starts[-1] + len(part.queries))
        return RowCuts(
            on_device([part.row for part in parts], torch.int64, self._device),
            on_device(starts, torch.int32, self._device),
            on_device([part.queries.stop for part in parts], torch.int32, self._device),
        )

    def _reasons(
        self, rows: StepRows, dense_until: Sequence[int], routes: Sequence[int]
    ) -> list[RowReason]:
        if rows.seq_lens_cpu is None:
            return [RowReason.UNKNOWN_LENGTH] * rows.num_decodes
        lengths = rows.seq_lens_cpu.tolist()
        return [
            self._reason(seq_len, dense_until[row], routes[row] if routes else 0)
            for row, seq_len in enumerate(lengths)
        ]

    def _reason(self, seq_len: int, dense_until: int, route: int) -> RowReason:
        if not self._narrowed:
            return RowReason.NO_SPARSE_LAYERS
        if dense_until >= EVERYTHING_TOKENS:
            return RowReason.REQUEST_OFF
        if all(narrowed.is_full(route) for narrowed in self._narrowed):
            return RowReason.ROUTED_FULL
        hides = not self._span.sees_everything(seq_len)
        return RowReason.SELECTED if hides else RowReason.EVERYTHING_KEPT


def _prompt_rows(rows: StepRows) -> Iterator[PromptRow | None]:
    """All rows, as far as they are somebody's."""
    stops: list[int] = []
    if rows.seq_lens_cpu is not None:
        stops = rows.seq_lens_cpu.tolist()
    queries = [*(range(stop - 1, stop) for stop in stops), *rows.prefill_queries]
    for row in range(rows.num_rows):
        request_id = rows.request_ids[row] if row < len(rows.request_ids) else None
        limit = rows.dense_until[row] if row < len(rows.dense_until) else None
        if request_id is None or limit is None:
            yield None
        elif row >= len(queries):
            raise RuntimeError(f"nobody says where the queries of {request_id} stand")
        else:
            yield PromptRow(request_id, limit, queries[row])


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


def _parts(rows: StepRows) -> Iterator[RowPart]:
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
            yield RowPart(row, range(queries.start, cut), True)
        if cut < queries.stop:
            yield RowPart(row, range(cut, queries.stop), False)


def answer_entries(
    schedule: LayerSchedule, frees: bool, reread_tokens: int = 0
) -> tuple[KVEntry, ...]:
    """What is kept; nothing generated serves a later prompt, in no layer.

    Args:
        schedule: of WINDOW, DENSE and DROP layers.
        frees: whether WINDOW layers free behind the prompt what no answer sees.
        reread_tokens: see ``KeepAll``.
    """
    kept = KeepAll(caches_generated=False, reread_tokens=reread_tokens)
    route_of = {layer: i for i, group in enumerate(schedule.routed_groups) for layer in group}
    policies = [
        AfterPrompt(schedule.spans[layer][0], route_of.get(layer), reread_tokens)
        if frees and layer in schedule.spans
        else kept
        for layer in range(len(schedule.roles))
    ]
    return layer_entries(policies, schedule.dropped)
