"""What a layer does whose KV heads keep different blocks: heads become rows (head_tables.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from attn_backends.batch import SpanRule
from attn_backends.head_tables import (
    HeadPlaces,
    HeadRows,
    HeadTables,
    fold_out,
    fold_prefill,
    fold_prefill_rule,
    fold_query,
    fold_rule,
    fold_selection,
    unfold_prefill,
)
from attn_backends.layer_step import LayerStep, StepBatch
from attn_backends.plan import Dense, LayerPlan, Selected


@dataclass(frozen=True)
class SplitRows:
    """The rows of a step, once per KV head, for all layers whose heads keep different blocks."""

    num_kv_heads: int
    decode: HeadRows | None
    prefill: HeadRows | None

    @classmethod
    def of(cls, batch: StepBatch, shared: HeadTables, tables: Sequence[torch.Tensor]) -> SplitRows:
        """Made once per step.

        Args:
            batch: the rows; its block tables are not read.
            shared: sizes and buffers.
            tables: of each KV group, ``[num_reqs, max_blocks]`` int32, all rows.
        """
        decode = prefill = None
        first = batch.num_decodes
        if batch.decode is not None:
            decode = shared.decode_rows(batch.decode, [table[:first] for table in tables])
        if batch.prefill is not None:
            prefill = shared.prefill_rows(batch.prefill, [table[first:] for table in tables])
        return cls(shared.num_kv_heads, decode, prefill)


@dataclass(frozen=True)
class SplitLayerStep:
    """As ``LayerStep``, for a layer whose KV heads keep different blocks: heads become rows.

    Attributes:
        step: with the pool's views, ``[num_tiles, 1, block_size, head_size]``, and ops that serve
            layers of one KV head.
        rows: of the step.
        places: of the layer's heads.

    Raises:
        TypeError: a plan that chooses blocks, or has a witness: it would see heads as rows.
    """

    step: LayerStep
    rows: SplitRows
    places: HeadPlaces

    def __post_init__(self) -> None:
        plan = self.step.plan
        if not isinstance(plan.decode, Dense | Selected) or plan.witness is not None:
            raise TypeError(f"a layer whose heads keep different blocks cannot follow {plan}")

    def attend(self, query: torch.Tensor, out: torch.Tensor) -> None:
        """See ``LayerStep.attend``."""
        num_decodes, prefill = self.step.batch.num_decodes, self.step.batch.prefill
        if self.rows.decode is not None:
            self._decode(self.rows.decode, num_decodes, query[:num_decodes], out[:num_decodes])
        if prefill is not None and self.rows.prefill is not None:
            tokens = slice(num_decodes, num_decodes + prefill.num_tokens)
            rule = self.step.plan.prefill_rule(num_decodes, prefill.num_reqs)
            self._prefill(self.rows.prefill, rule, query[tokens], out[tokens])

    def _decode(
        self, rows: HeadRows, num_rows: int, query: torch.Tensor, out: torch.Tensor
    ) -> None:
        heads, plan = self.rows.num_kv_heads, self.step.plan
        way = plan.decode
        if isinstance(way, Selected):
            way = Selected(fold_selection(way.selection))
        rule = None if plan.rule is None else fold_rule(plan.rule.rows(0, num_rows))
        batch = StepBatch(self.places.batch(rows), None)
        folded = replace(self.step, plan=LayerPlan(way, rule), batch=batch)
        folded.attend(fold_query(query, heads), fold_out(out, heads))

    def _prefill(
        self, rows: HeadRows, rule: SpanRule | None, query: torch.Tensor, out: torch.Tensor
    ) -> None:
        by_head = fold_prefill(query, self.rows.num_kv_heads)
        result = torch.empty_like(by_head)
        self.step.ops.paged_attention.run(
            by_head,
            *self.step.views,
            self.places.batch(rows),
            fold_prefill_rule(rule),
            self.step.scale,
            result,
        )
        unfold_prefill(result, out)
