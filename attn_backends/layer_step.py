"""What one attention layer does with the rows of a step: tensors and a plan, no engine.

Decode rows go the way of the layer's role (``LayerRole``), prefill rows beside them through
``paged_attention``; keys and values of all of them are in the cache already.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from attn_backends.batch import BlockSelection, PagedBatch
from attn_backends.ops.resolution import Ops
from attn_backends.plan import SELECTING_ROLES, AnchorState, DecodePlan, KeptRows, LayerRole
from attn_backends.recall import SERVED, inherited_recall, own_recall, served_recall


@dataclass(frozen=True)
class LayerStep:
    """One layer in one step.

    Attributes:
        name: the engine's, by which the plan knows the layer.
        plan: of the step, for this layer.
        ops: what serves it.
        views: key and value cache, ``[num_blocks, num_kv_heads, block_size, head_size]``.
        scale: of the scores.
    """

    name: str
    plan: DecodePlan
    ops: Ops
    views: tuple[torch.Tensor, torch.Tensor]
    scale: float

    def attend(self, query: torch.Tensor, out: torch.Tensor) -> None:
        """All rows.

        Args:
            query: ``[num_tokens, num_heads, head_size]``, possibly padded at the end.
            out: like ``query``; written in place, padding apart.
        """
        plan, role = self.plan, self.plan.roles[self.name]
        if plan.decode is not None:
            rows = slice(0, plan.num_decode_tokens)
            self._decode(role, plan.decode, query[rows], out[rows])
        if plan.prefill is not None:
            rows = slice(plan.num_decode_tokens, plan.num_tokens)
            # The rule is the selecting layers'; a dense layer beside them reads everything.
            rule = None if role is LayerRole.DENSE else plan.prefill_rule
            self.ops.paged_attention.run(
                query[rows], *self.views, plan.prefill, rule, self.scale, out[rows]
            )

    def _decode(
        self, role: LayerRole, decode: PagedBatch, query: torch.Tensor, out: torch.Tensor
    ) -> None:
        plan, ops = self.plan, self.ops
        if plan.decodes_densely or role is LayerRole.DENSE:
            ops.anchor_decode.run(query, *self.views, decode, self.scale, out, None)
            return
        selection = plan.selection
        assert selection is not None
        if role in SELECTING_ROLES:
            assert plan.anchor is not None
            if plan.kept is not None:
                self._reselect(plan.anchor, plan.kept, selection, query)
            else:
                attended = out if role is LayerRole.ANCHOR else None
                self._select(query, decode, plan.anchor, selection, attended)
        if role is LayerRole.ANCHOR:
            return
        head_map = plan.head_maps.get(self.name)
        if head_map is not None:
            selection = BlockSelection(
                selection.logical_blocks[:, head_map], selection.counts[:, head_map]
            )
        if role is LayerRole.REUSE and plan.checked is not None:
            assert plan.anchor is not None
            self._check(plan.anchor, plan.checked.rows, plan.checked.batch, query, selection)
        ops.sparse_decode.run(
            query, *self.views, decode, selection, plan.decode_rule, self.scale, out
        )

    def _select(
        self,
        query: torch.Tensor,
        decode: PagedBatch,
        anchor: AnchorState,
        selection: BlockSelection,
        attended: torch.Tensor | None,
    ) -> None:
        """Overwrites ``selection``, the anchor's before, with this layer's choice."""
        self.ops.anchor_decode.run(
            query, *self.views, decode, self.scale, attended, anchor.block_mass
        )
        own, inherited, _ = anchor.recall.unbind(1)
        if self.name in self.plan.inheriting:
            before = inherited_recall(anchor.block_mass, selection)
            torch.minimum(inherited, before, out=inherited)
        self._choose(anchor, decode, selection)
        torch.minimum(own, own_recall(anchor.block_mass, selection), out=own)

    def _choose(self, anchor: AnchorState, decode: PagedBatch, into: BlockSelection) -> None:
        """The best blocks by ``anchor.block_mass``."""
        self.ops.block_topk.run(
            anchor.block_mass,
            decode.seq_lens,
            self.views[0].shape[2],
            anchor.budget_blocks,
            anchor.sink_blocks,
            anchor.recent_blocks,
            into,
        )

    def _reselect(
        self, anchor: AnchorState, kept: KeptRows, selection: BlockSelection, query: torch.Tensor
    ) -> None:
        """Rows that are due select and keep what they selected; then all read what is kept."""
        store = kept.stores[self.name]
        if kept.due is not None:
            rows = kept.due.rows
            due = _of_rows(anchor, rows)
            chosen = BlockSelection(selection.logical_blocks[rows], selection.counts[rows])
            self._select(query[rows], kept.due.batch, due, chosen, None)
            anchor.recall[rows] = due.recall
            slots = kept.slots[rows]
            store.logical_blocks[slots] = chosen.logical_blocks
            store.counts[slots] = chosen.counts
        torch.index_select(store.logical_blocks, 0, kept.slots, out=selection.logical_blocks)
        torch.index_select(store.counts, 0, kept.slots, out=selection.counts)

    def _check(
        self,
        anchor: AnchorState,
        rows: torch.Tensor,
        checked: PagedBatch,
        query: torch.Tensor,
        selection: BlockSelection,
    ) -> None:
        """Lowers the checked rows' served recall to this layer's; its output is not touched."""
        # The last anchor's masses have been used: their memory holds this layer's.
        own = _of_rows(anchor, rows)
        self.ops.anchor_decode.run(
            query[rows], *self.views, checked, self.scale, None, own.block_mass
        )
        given = BlockSelection(selection.logical_blocks[rows], selection.counts[rows])
        best = BlockSelection(
            torch.empty_like(given.logical_blocks), torch.empty_like(given.counts)
        )
        self._choose(own, checked, best)
        served = anchor.recall[:, SERVED]
        served[rows] = torch.minimum(served[rows], served_recall(own.block_mass, given, best))


def _of_rows(anchor: AnchorState, rows: torch.Tensor) -> AnchorState:
    """The state of some rows; masses are written anew, the rest is copied."""
    return replace(
        anchor,
        block_mass=anchor.block_mass[: len(rows)],
        budget_blocks=anchor.budget_blocks[rows],
        recall=anchor.recall[rows],
    )
