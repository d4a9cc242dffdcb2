"""Sparse rows as drafts: a step drafts some tokens one by one, then verifies all of them densely.

The first draft of a step chooses blocks as the method does, with its own query. The later ones read
what was chosen: each anchor keeps a selection of its own, which also names the blocks that later
drafts may begin. Kernels leave out what lies past a row's end, so that from one draft to the next
nothing of a selection changes, and rows differ by their lengths alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from attn_backends.batch import BlockSelection
from attn_backends.lossless_config import LosslessConfig
from attn_backends.method import Geometry, Selector, StepRows
from attn_backends.plan import (
    CHOOSING_ROLES,
    Anchor,
    AnchorState,
    DecodeWay,
    LayerSchedule,
    Reuse,
    Selected,
    StepPlan,
)
from kvcache.entries import KVEntry
from kvcache.retention import KeepAll


class DraftSelector:
    """Plans the drafts of a step, around the selector of a method.

    Args:
        selector: plans the first draft; where no layer chooses, every draft.
        schedule: of the layers.
        geometry: of the layers.
        device: of the buffers.
        num_drafts: tokens that a step drafts at most.
    """

    def __init__(
        self,
        selector: Selector,
        schedule: LayerSchedule,
        geometry: Geometry,
        device: torch.device,
        num_drafts: int,
    ) -> None:
        self._selector = selector
        self._max_model_len = geometry.max_model_len
        max_blocks = -(-geometry.max_model_len // geometry.block_size)
        shape = (geometry.max_num_reqs, geometry.num_kv_heads, max_blocks)
        self._kept = {
            layer: BlockSelection.empty(shape, device)
            for layer in schedule.of_role(*CHOOSING_ROLES)
        }
        self._ahead_tokens = num_drafts - 1
        self._ahead_blocks = -(-self._ahead_tokens // geometry.block_size)
        self._last_lens = torch.zeros(shape[0], dtype=torch.int32, device=device)
        self._later = StepPlan({}, ())

    def plan(self, rows: StepRows) -> StepPlan:
        """See ``Selector.plan``; ``StepRows.draft_index`` counts the drafts of a step.

        Raises:
            RuntimeError: a later draft of other rows than those of the first one.
        """
        if not self._kept or not rows.draft_index:
            plan = self._selector.plan(replace(rows, request_ids=()))  # nobody's recall is watched
            return self._first(plan, rows) if self._kept else plan
        if len(self._later.reasons) != rows.num_decodes:
            raise RuntimeError(
                f"draft {rows.draft_index} has {rows.num_decodes} rows, the first one had "
                f"{len(self._later.reasons)}"
            )
        return self._later

    def _first(self, plan: StepPlan, rows: StepRows) -> StepPlan:
        """The first draft's plan: every anchor chooses into what it keeps."""
        num_rows = rows.num_decodes
        last_lens = self._last_lens[:num_rows]
        torch.add(rows.seq_lens, self._ahead_tokens, out=last_lens)
        last_lens.clamp_max_(self._max_model_len)
        first, later = {}, {}
        kept: BlockSelection | None = None  # the last anchor's
        widened: AnchorState | None = None  # the same for all anchors
        for layer in sorted(plan.layers):
            layer_plan = plan.layers[layer]
            way: DecodeWay = layer_plan.decode
            then = way
            if isinstance(way, Anchor):
                kept = self._kept[layer].rows(0, num_rows)
                widened = widened or self._reaching_ahead(way.state, last_lens)
                way = replace(way, selection=kept, state=widened, inherits=False, kept=None)
                then = Selected(kept)
            elif isinstance(way, Reuse):
                assert kept is not None, "LayerSchedule has an anchor before every REUSE layer"
                then = way = Selected(replace(kept, heads=way.selection.heads))
            first[layer], later[layer] = (
                replace(layer_plan, decode=way),
                replace(layer_plan, decode=then),
            )
        self._later = StepPlan(later, plan.reasons)
        return StepPlan(first, plan.reasons)

    def _reaching_ahead(self, state: AnchorState, last_lens: torch.Tensor) -> AnchorState:
        """The anchors' state with room for the blocks of later drafts, beside the budget."""
        state.budget_blocks.add_(self._ahead_blocks)
        return replace(
            state,
            recent_blocks=max(state.recent_blocks, 1) + self._ahead_blocks,
            recall=None,
            chosen_lens=last_lens,
        )


def drafting_if_asked(
    selector: Selector,
    config: LosslessConfig,
    schedule: LayerSchedule,
    geometry: Geometry,
    device: torch.device,
) -> Selector:
    """The selector of a method, around which drafts are planned where its rows only draft."""
    if not config.is_lossless:
        return selector
    return DraftSelector(selector, schedule, geometry, device, config.lossless_tokens)


def check_drafting(schedule: LayerSchedule, entries: Iterable[KVEntry]) -> None:
    """Refuses what a dense pass could not verify: what is dropped or freed is lost to it as well.

    Raises:
        ValueError: names the layers.
    """
    if schedule.dropped:
        raise ValueError(
            f"layers {list(schedule.dropped)} are dropped in the profile, which stock vLLM's "
            "answers need; use a profile without drop_layers, or set lossless_tokens to 0"
        )
    freeing = sorted({e.layer for e in entries if not isinstance(e.policy, KeepAll)})
    if freeing:
        raise ValueError(
            f"layers {freeing} free KV blocks, which stock vLLM's answers need; use a policy "
            "without window layers, or set lossless_tokens to 0"
        )
