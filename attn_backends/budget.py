"""The selector of methods that choose blocks by attention mass, within a budget."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace

import torch

from attn_backends.batch import BlockSelection, RowOptions, copy_without_waiting
from attn_backends.budget_config import BudgetConfig
from attn_backends.method import Geometry, StepRows
from attn_backends.plan import (
    CHOOSING_ROLES,
    DENSE_LAYER,
    Anchor,
    AnchorState,
    Checked,
    DecodeWay,
    KeptRows,
    LayerPlan,
    LayerRole,
    LayerSchedule,
    Reuse,
    RowReason,
    StepPlan,
)
from attn_backends.recall import RecallWatch
from attn_backends.reselection import KeptStep, SelectionKeeper
from attn_backends.windows import WindowLayers
from kvcache.entries import KVEntry, layer_entries
from kvcache.retention import KeepAll

NO_OPTIONS = RowOptions()  # of a request that asks for nothing


class BudgetSelector:
    """Owns the selection that anchors fill and reuse layers read, and what is known of it.

    Args:
        config: the budgets.
        schedule: of the layers.
        geometry: of the layers.
        device: of the buffers.
        reselect_steps: decode steps from one choice of a row to the next.
    """

    def __init__(
        self,
        config: BudgetConfig,
        schedule: LayerSchedule,
        geometry: Geometry,
        device: torch.device,
        reselect_steps: int = 1,
    ) -> None:
        self._config, self._schedule = config, schedule
        self._anchors = schedule.of_role(*CHOOSING_ROLES)
        self._block_size = block_size = geometry.block_size
        self._budget_blocks = -(-config.budget_tokens // block_size)
        self._sink_blocks = -(-config.sink_tokens // block_size)
        self._recent_blocks = -(-config.recent_tokens // block_size)
        self._max_blocks = -(-geometry.max_model_len // block_size)
        shape = (geometry.max_num_reqs, geometry.num_kv_heads, self._max_blocks)
        self._selection = BlockSelection.empty(shape, device)
        self._mass = torch.zeros(shape, dtype=torch.float32, device=device)
        self._budgets = torch.zeros(shape[0], dtype=torch.int32, device=device)
        self._scored_lens = torch.zeros(shape[0], dtype=torch.int32, device=device)
        self._head_maps = {
            layer: torch.tensor(heads, device=device) for layer, heads in schedule.head_maps.items()
        }
        self._windows = WindowLayers(schedule, geometry, device)
        self._leaves_out = bool(schedule.of_role(LayerRole.REUSE, LayerRole.SELF))
        self._watch: RecallWatch | None = None
        if device.type == "cpu":
            self._watch = RecallWatch(
                config.recall_floor,
                config.guard_patience,
                config.guard_interval_steps,
                shape[0],
                device,
            )
        self._keeper = None
        if reselect_steps > 1:
            self._keeper = SelectionKeeper(
                reselect_steps, self._budget_kind, self._anchors, shape, device
            )

    def plan(self, rows: StepRows) -> StepPlan:
        """See ``Selector.plan``."""
        watch = self._watch if rows.request_ids else None
        options = rows.options if self._watch is None else self._begin_step(self._watch, rows)
        # Device and host have the same lengths, and the host's arithmetic launches nothing.
        lengths = rows.seq_lens if rows.seq_lens_cpu is None else rows.seq_lens_cpu
        budgets = self._budget_blocks_of(lengths, options)
        if rows.prompt_rows:
            budgets[list(rows.prompt_rows)] = self._max_blocks
        keeps_all = budgets * self._block_size >= lengths
        reasons = self._reasons(rows, keeps_all, options)
        kept = self._kept(rows, reasons, options)
        state = self._state(rows, budgets, keeps_all, watch)
        checked = None if watch is None else self._checked(watch, rows, reasons, kept)
        by_anchor = {} if kept is None else kept.by_anchor
        layers = self._layers(rows.num_decodes, state, by_anchor, checked)
        return StepPlan({**self._windows.plan(rows), **layers}, reasons, self._watch)

    def _checked(
        self,
        watch: RecallWatch,
        rows: StepRows,
        reasons: Sequence[RowReason],
        kept: KeptStep | None,
    ) -> Checked | None:
        narrowed = [row for row, reason in enumerate(reasons) if reason.is_narrowed]
        due = watch.expect(rows.request_ids, narrowed, None if kept is None else kept.due_rows)
        return Checked(torch.tensor(due), watch.recall) if due else None

    def _begin_step(self, watch: RecallWatch, rows: StepRows) -> Mapping[int, RowOptions]:
        """The rows' options, after what the step before has shown."""
        watch.begin_step(rows.request_ids)
        watch.forget(rows.ended_ids)
        return watch.guarded(rows.request_ids, rows.options)

    def _layers(
        self,
        num_rows: int,
        state: AnchorState,
        kept: Mapping[int, KeptRows],
        checked: Checked | None,
    ) -> dict[int, LayerPlan]:
        """Plans of the layers that have no window; views of the buffers, made once for all."""
        selection = self._selection.rows(0, num_rows)
        inheriting = self._anchors[1:] if self._schedule.shares_selections else ()
        ways: dict[int, DecodeWay] = dict.fromkeys(
            self._schedule.of_role(LayerRole.DENSE), DENSE_LAYER.decode
        )
        for layer in self._anchors:
            everything = self._schedule.roles[layer] is LayerRole.ANCHOR
            inherits = layer in inheriting
            ways[layer] = Anchor(selection, state, everything, inherits, kept.get(layer))
        for layer in self._schedule.of_role(LayerRole.REUSE):
            heads = self._head_maps.get(layer)
            read = selection if heads is None else replace(selection, heads=heads)
            ways[layer] = Reuse(read, state, checked)
        return {layer: LayerPlan(way) for layer, way in ways.items()}

    def _kept(
        self, rows: StepRows, reasons: Sequence[RowReason], options: Mapping[int, RowOptions]
    ) -> KeptStep | None:
        ids = [name for name in rows.request_ids if name is not None]
        if self._keeper is None or rows.seq_lens_cpu is None or len(ids) != rows.num_decodes:
            return None  # a dummy batch has no ids
        self._keeper.forget(rows.ended_ids)
        keys = [(reason, options.get(row)) for row, reason in enumerate(reasons)]
        return self._keeper.begin_step(ids, rows.seq_lens_cpu.tolist(), keys)

    def _state(
        self,
        rows: StepRows,
        budgets: torch.Tensor,
        keeps_all: torch.Tensor,
        watch: RecallWatch | None,
    ) -> AnchorState:
        """Short and dense rows get a budget for everything, and so need no scores."""
        num_rows = rows.num_decodes
        own_budgets, scored_lens = self._budgets[:num_rows], self._scored_lens[:num_rows]
        most_scored = torch.full_like(budgets, torch.iinfo(budgets.dtype).max)
        most_scored.masked_fill_(keeps_all, 1)
        copy_without_waiting(budgets, own_budgets)
        copy_without_waiting(most_scored, scored_lens)
        torch.minimum(scored_lens, rows.seq_lens, out=scored_lens)
        return AnchorState(
            self._mass[:num_rows],
            own_budgets,
            scored_lens,
            self._sink_blocks,
            self._recent_blocks,
            None if watch is None else watch.recall[:num_rows],
        )

    def _budget_kind(self, seq_len: int) -> Hashable:
        """What the server's budget of a length follows from; another kind chooses anew."""
        return None

    def _budget_blocks_of(
        self, seq_lens: torch.Tensor, options: Mapping[int, RowOptions]
    ) -> torch.Tensor:
        """Blocks that each row may read: what anchors are given, and what the row is counted as.

        Args:
            seq_lens: ``[num_reqs]`` int32.
            options: by row index, what was asked for.

        Returns:
            ``[num_reqs]`` int32, a new tensor where ``seq_lens`` is; no host synchronisation.
        """
        budgets = self._server_budget_blocks(seq_lens)
        if self._config.budget_fraction:
            share_tokens = seq_lens * self._config.budget_fraction
            share_blocks = torch.ceil(share_tokens / self._block_size).to(torch.int32)
            torch.maximum(budgets, share_blocks, out=budgets)
        for row, asked in options.items():
            if asked.is_dense:
                budgets[row] = self._max_blocks
            elif asked.budget_tokens is not None:
                budgets[row] = -(-asked.budget_tokens // self._block_size)
            else:
                scaled = torch.ceil(budgets[row] * asked.budget_factor).to(torch.int32)
                budgets[row] = scaled.clamp_min(self._sink_blocks + self._recent_blocks)
        is_short = seq_lens <= self._config.min_context_tokens
        return budgets.masked_fill_(is_short, self._max_blocks).clamp_max_(self._max_blocks)

    def _server_budget_blocks(self, seq_lens: torch.Tensor) -> torch.Tensor:
        """The server's budget of each row, a new tensor."""
        return torch.full_like(seq_lens, self._budget_blocks, dtype=torch.int32)

    def _reasons(
        self, rows: StepRows, keeps_all: torch.Tensor, options: Mapping[int, RowOptions]
    ) -> list[RowReason]:
        if rows.seq_lens_cpu is None:
            return [RowReason.UNKNOWN_LENGTH] * rows.num_decodes
        known = zip(rows.seq_lens_cpu.tolist(), keeps_all.tolist(), strict=True)
        return [
            self._reason(seq_len, keeps, options.get(row, NO_OPTIONS))
            for row, (seq_len, keeps) in enumerate(known)
        ]

    def _reason(self, seq_len: int, keeps_all: bool, asked: RowOptions) -> RowReason:
        if asked.is_dense:
            reason = RowReason.GUARD if asked.is_guarded else RowReason.REQUEST_OFF
        elif seq_len <= self._config.min_context_tokens:
            reason = RowReason.SHORT_CONTEXT
        elif not self._leaves_out:
            reason = RowReason.NO_SPARSE_LAYERS
        elif keeps_all:
            reason = RowReason.EVERYTHING_KEPT
        else:
            return RowReason.GUARD_RAISED if asked.is_guarded else RowReason.SELECTED
        # Not dense while some layer reads its window only.
        return RowReason.WINDOW_LAYERS if self._windows.hide_something(seq_len) else reason


def prompts_cached(
    config: BudgetConfig, schedule: LayerSchedule, geometry: Geometry
) -> tuple[KVEntry, ...]:
    """Entries of methods with dense prefill and sparse decode: all is kept, but what was
    generated never serves a later prompt (it would have been computed densely), unless sparse rows
    only draft.
    """
    policies = (KeepAll(caches_generated=config.is_lossless),) * geometry.num_layers
    return layer_entries(policies, schedule.dropped)
