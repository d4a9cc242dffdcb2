"""What one attention layer does with the rows of a step: tensors and a plan, no engine.

Decode rows go the way of the layer's plan (``plan.DecodeWay``), prefill rows beside them through
``paged_attention``; keys and values of all of them are in the cache already.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import assert_never

import torch

from attn_backends.batch import BlockSelection, PagedBatch, RowCuts
from attn_backends.ops.resolution import Ops
from attn_backends.plan import (
    Anchor,
    AnchorState,
    Checked,
    Dense,
    KeptRows,
    LayerPlan,
    Reuse,
    Selected,
)
from attn_backends.recall import SERVED, inherited_recall, own_recall, served_recall


@dataclass(frozen=True)
class StepBatch:
    """The rows of one step: decode rows (one query token each) first, prefill rows after them.

    Attributes:
        decode: None where there is no decode row.
        prefill: None where there is no prefill row.
    """

    decode: PagedBatch | None
    prefill: PagedBatch | None

    @classmethod
    def split(cls, batch: PagedBatch, num_decodes: int, max_model_len: int) -> StepBatch:
        """The two kinds of rows of a batch whose first ``num_decodes`` are decode rows.

        Args:
            batch: all rows.
            num_decodes: how many are decode rows.
            max_model_len: stands for the longest decode row, so that launches cannot depend on it.
        """
        decode = prefill = None
        if num_decodes:
            rows = batch.rows(0, num_decodes, 0, num_decodes)
            decode = replace(rows, max_query_len=1, max_seq_len=max_model_len)
        if num_decodes < batch.num_reqs:
            prefill = batch.rows(num_decodes, batch.num_reqs, num_decodes, batch.num_tokens)
        return cls(decode, prefill)

    def cut(self, cuts: RowCuts | None) -> StepBatch:
        """The same tokens, prefill rows in these parts."""
        if cuts is None or self.prefill is None:
            return self
        return replace(self, prefill=cuts.of(self.prefill))

    @property
    def num_decodes(self) -> int:
        """Decode rows, and their tokens."""
        return 0 if self.decode is None else self.decode.num_reqs

    @property
    def num_tokens(self) -> int:
        """Query tokens of all rows, padding apart."""
        return self.num_decodes + (0 if self.prefill is None else self.prefill.num_tokens)


def ops_of(plan: LayerPlan, ops: tuple[Ops, Ops]) -> Ops:
    """What serves a layer in a step.

    Args:
        plan: of the layer.
        ops: of layers without and with a token rule, which not every kernel has.
    """
    plain, ruled = ops
    if plan.rule is None:
        return plain
    return replace(ruled, paged_attention=plain.paged_attention) if plan.is_prefill_plain else ruled


@dataclass(frozen=True)
class LayerStep:
    """One layer in one step.

    Attributes:
        plan: of the layer.
        batch: the rows, with the block table of the layer.
        ops: what serves them.
        views: key and value cache, ``[num_blocks, num_kv_heads, block_size, head_size]``.
        scale: of the scores.
    """

    plan: LayerPlan
    batch: StepBatch
    ops: Ops
    views: tuple[torch.Tensor, torch.Tensor]
    scale: float

    def attend(self, query: torch.Tensor, out: torch.Tensor) -> None:
        """All rows.

        Args:
            query: ``[num_tokens, num_heads, head_size]``, possibly padded at the end.
            out: like ``query``; written in place, padding apart.
        """
        num_decodes = self.batch.num_decodes
        if self.batch.decode is not None:
            self._decode(self.batch.decode, query[:num_decodes], out[:num_decodes])
        prefill = self.batch.prefill
        if prefill is not None:
            tokens = slice(num_decodes, num_decodes + prefill.num_tokens)
            if self.plan.witness is not None:
                self.plan.witness(query[tokens], self.views[0], prefill, self.scale)
            rule = self.plan.prefill_rule(num_decodes, prefill.num_reqs)
            self.ops.paged_attention.run(
                query[tokens], *self.views, prefill, rule, self.scale, out[tokens]
            )

    def _decode(self, decode: PagedBatch, query: torch.Tensor, out: torch.Tensor) -> None:
        way = self.plan.decode
        match way:
            case Dense():
                self.ops.dense_decode.run(query, *self.views, decode, self.scale, out)
            case Selected():
                self._read(way.selection, decode, query, out)
            case Anchor():
                self._anchor(way, decode, query, out)
            case Reuse():
                if way.checked is not None:
                    self._check(way.state, way.checked, decode, query, way.selection)
                self._read(way.selection, decode, query, out)
            case _:
                assert_never(way)

    def _read(
        self,
        selection: BlockSelection,
        decode: PagedBatch,
        query: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        rule = None if self.plan.rule is None else self.plan.rule.rows(0, decode.num_reqs)
        self.ops.sparse_decode.run(query, *self.views, decode, selection, rule, self.scale, out)

    def _anchor(
        self, way: Anchor, decode: PagedBatch, query: torch.Tensor, out: torch.Tensor
    ) -> None:
        if way.kept is None:
            attended = out if way.attends_everything else None
            self._choose(way, decode, query, attended)
        else:
            self._rechoose(way, way.kept, decode, query)
        if not way.attends_everything:
            self._read(way.selection, decode, query, out)

    def _choose(
        self, way: Anchor, decode: PagedBatch, query: torch.Tensor, attended: torch.Tensor | None
    ) -> None:
        """Overwrites the selection, the anchor's before, with this layer's choice."""
        state = way.state
        scored = decode if attended is not None else replace(decode, seq_lens=state.scored_lens)
        self.ops.anchor_decode.run(
            query, *self.views, scored, self.scale, attended, state.block_mass
        )
        if state.recall is None:
            self._best(state, decode, way.selection)
            return
        own, inherited, _ = state.recall.unbind(1)
        if way.inherits:
            before = inherited_recall(state.block_mass, way.selection)
            torch.minimum(inherited, before, out=inherited)
        self._best(state, decode, way.selection)
        torch.minimum(own, own_recall(state.block_mass, way.selection), out=own)

    def _best(self, state: AnchorState, decode: PagedBatch, into: BlockSelection) -> None:
        """The best blocks by ``state.block_mass``."""
        self.ops.block_topk.run(
            state.block_mass,
            decode.seq_lens if state.chosen_lens is None else state.chosen_lens,
            self.views[0].shape[2],
            state.budget_blocks,
            state.sink_blocks,
            state.recent_blocks,
            into,
        )

    def _rechoose(
        self, way: Anchor, kept: KeptRows, decode: PagedBatch, query: torch.Tensor
    ) -> None:
        """Rows that are due choose and keep what they chose; then all read what is kept."""
        selection = way.selection
        if kept.due is not None:
            state = _of_rows(way.state, kept.due)
            chosen = _selection_of_rows(selection, kept.due)
            due = replace(way, selection=chosen, state=state, kept=None)
            self._choose(due, decode.decode_rows(kept.due), query[kept.due], None)
            if way.state.recall is not None and state.recall is not None:
                way.state.recall[kept.due] = state.recall
            slots = kept.slots[kept.due]
            kept.store.logical_blocks[slots] = chosen.logical_blocks
            kept.store.counts[slots] = chosen.counts
        torch.index_select(kept.store.logical_blocks, 0, kept.slots, out=selection.logical_blocks)
        torch.index_select(kept.store.counts, 0, kept.slots, out=selection.counts)

    def _check(
        self,
        state: AnchorState,
        checked: Checked,
        decode: PagedBatch,
        query: torch.Tensor,
        selection: BlockSelection,
    ) -> None:
        """Lowers the checked rows' served recall to this layer's; its output is not touched."""
        # The last anchor's masses have been used: their memory holds this layer's.
        rows = checked.rows
        own, batch = _of_rows(state, rows), decode.decode_rows(rows)
        self.ops.anchor_decode.run(
            query[rows], *self.views, batch, self.scale, None, own.block_mass
        )
        given = _selection_of_rows(selection, rows)
        best = BlockSelection(
            torch.empty_like(given.logical_blocks), torch.empty_like(given.counts)
        )
        self._best(own, batch, best)
        served = checked.recall[:, SERVED]
        served[rows] = torch.minimum(served[rows], served_recall(own.block_mass, given, best))


def _selection_of_rows(selection: BlockSelection, rows: torch.Tensor) -> BlockSelection:
    """Some rows, each KV head with the blocks that it reads."""
    blocks, counts = selection.logical_blocks[rows], selection.counts[rows]
    if selection.heads is not None:
        blocks, counts = blocks[:, selection.heads], counts[:, selection.heads]
    return BlockSelection(blocks, counts)


def _of_rows(state: AnchorState, rows: torch.Tensor) -> AnchorState:
    """The state of some rows; masses are written anew, the rest is copied."""
    return replace(
        state,
        block_mass=state.block_mass[: len(rows)],
        budget_blocks=state.budget_blocks[rows],
        scored_lens=state.scored_lens[rows],
        recall=None if state.recall is None else state.recall[rows],
    )
