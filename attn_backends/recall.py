"""How much attention mass a selection covers, and what to do when it is too little.

Anchor layers see all keys, so the share of their mass that a selection covers is known
exactly and for nothing, twice per anchor:

*own*
    what the anchor has just selected: low where attention is too flat for the budget;
*inherited*
    what the layers since the anchor before it have been reading: low where the profile lets
    layers follow an anchor that looks elsewhere. A head of this anchor is compared with the
    head before that covers it best, since head maps may cross.

Neither sees a layer between two anchors that attends to something else than both, and that is
how a bad profile fails: on the demo model, anchors that lose every needle have better figures of
both kinds than the calibrated ones. Therefore, where a guard is asked for, some decode steps of
every request are *checked*: reuse layers also score all keys, and

*served*
    is what the selection they were given covers, relative to what their own choice within the
    same budget would have covered, of the worst head in the worst layer. (Not the covered mass
    itself: sinks and recent tokens dominate it, and it falls as little for a lost needle as for
    flat attention. The ratio is Kascade's similarity, arXiv 2512.16391, at run time.)

Checks change no output, and depend on the request alone and not on its neighbours.

Recall is known on CPUs alone. On GPUs a decode step is a replayed graph, to which the host adds
nothing and from which it waits for nothing; and who reads it must know whose rows they are.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from attn_backends.batch import BlockSelection, RowOptions

KINDS = ("own", "inherited", "served")
SERVED = KINDS.index("served")
BOUNDS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975, 0.99, 1.0)  # of the histogram
EMA_WEIGHT = 0.05  # of a new step in the exported moving average
FIRST_CHECKS = 4  # sparse steps of a request that are always checked
RAISED_FACTOR = 2.0  # on the budget, before a request is served dense


def own_recall(block_mass: torch.Tensor, selection: BlockSelection) -> torch.Tensor:
    """Covered share of each row's mass, the mean over its KV heads.

    Args:
        block_mass: ``[num_reqs, num_kv_heads, max_blocks]`` fp32 (``anchor_decode``).
        selection: of the same rows and heads.

    Returns:
        ``[num_reqs]`` fp32, 0 to 1.
    """
    return (_covered(block_mass, selection) / block_mass.sum(2)).mean(1)


def inherited_recall(block_mass: torch.Tensor, selection: BlockSelection) -> torch.Tensor:
    """As ``own_recall``, each head under the selection of whichever head covers it best.

    Args:
        block_mass: of this anchor.
        selection: of the anchor before it.
    """
    chosen = _chosen(selection)[:, None]  # [num_reqs, 1, heads before, selected]
    shape = (-1, block_mass.shape[1], chosen.shape[2], -1)
    mass = block_mass[:, :, None].expand(shape)
    covered = mass.gather(3, chosen.clamp_min(0).long().expand(shape))
    covered = covered.masked_fill_(chosen < 0, 0.0).sum(3).amax(2)
    return (covered / block_mass.sum(2)).mean(1)


def served_recall(
    block_mass: torch.Tensor, given: BlockSelection, best: BlockSelection
) -> torch.Tensor:
    """Mass that ``given`` covers over mass that ``best`` covers, of the worst KV head.

    Args:
        block_mass: ``[num_reqs, num_kv_heads, max_blocks]`` of a reuse layer.
        given: the selection that the layer reads.
        best: its own choice within the same budget.

    Returns:
        ``[num_reqs]`` fp32, 0 to 1.
    """
    return (_covered(block_mass, given) / _covered(block_mass, best)).amin(1)


def _covered(block_mass: torch.Tensor, selection: BlockSelection) -> torch.Tensor:
    """``[num_reqs, num_kv_heads]``: mass of the selected blocks."""
    chosen = _chosen(selection)
    covered = block_mass.gather(2, chosen.clamp_min(0).long())
    return covered.masked_fill_(chosen < 0, 0.0).sum(2)


def _chosen(selection: BlockSelection) -> torch.Tensor:
    """The blocks, as many columns as some head fills: buffers are as wide as the longest row may
    become. The width is read on the host, which only CPUs do for nothing.
    """
    return selection.logical_blocks[:, :, : int(selection.counts.max())]


@dataclass
class _Request:
    """What the guard knows of one request."""

    steps: int = 0  # sparse decode steps so far
    low_checks: int = 0  # in a row
    level: int = 0  # 0: as asked for, 1: budget raised, 2: dense


class RecallWatch:
    """Collects the recall of every decode row, and guards requests that stay below a floor.

    Layers write into ``recall``; ``begin_step`` reads what the step before left there. A
    request whose served recall is below the floor in ``patience`` checks in a row gets twice its
    budget, and after as many more is served dense until it ends: that is never undone, since a
    dense row no longer shows what its selection would have covered. The first sparse steps
    of a request are checked (one alone misses most bad profiles), then every
    ``interval_steps``-th, and every step after a low one.

    Args:
        floor: least served recall, 0 to 1; 0 checks and guards nothing.
        patience: checks in a row below the floor before the guard acts.
        interval_steps: decode steps from one check to the next while all is well.
        max_num_reqs: rows of the buffer.
        device: of the buffer.
    """

    def __init__(
        self,
        floor: float,
        patience: int,
        interval_steps: int,
        max_num_reqs: int,
        device: torch.device,
    ) -> None:
        self.recall = torch.ones(max_num_reqs, len(KINDS), device=device)
        self.ema: dict[str, float] = {}
        self.histograms = {kind: [0] * (len(BOUNDS) + 1) for kind in KINDS}
        self.sums = dict.fromkeys(KINDS, 0.0)
        self.actions = {"raised": 0, "dense": 0}  # requests, so far
        self.shown: dict[Hashable, float] = {}  # of these totals, by whoever shows them
        self._floor, self._patience, self._interval_steps = floor, patience, interval_steps
        self._requests: dict[str, _Request] = {}
        self._narrowed: dict[int, str] = {}  # this step's narrowed rows and their request ids
        self._checked: Sequence[int] = ()  # those that are checked
        self._choosing: Collection[int] | None = None  # this step's; None: all rows

    def begin_step(self, row_ids: Sequence[str | None]) -> None:
        """Takes in the step before; called once per step.

        Args:
            row_ids: request ids of this step's decode rows.
        """
        if self._narrowed:
            self._take_in(self.recall[list(self._narrowed)].tolist())
        self._narrowed, self._checked = {}, ()
        self.recall[: len(row_ids)].fill_(1.0)

    def expect(
        self,
        row_ids: Sequence[str | None],
        narrowed_rows: Iterable[int],
        choosing_rows: Collection[int] | None = None,
    ) -> Sequence[int]:
        """Which rows of this step leave something out: only their recall counts.

        Args:
            row_ids: request ids of the decode rows.
            narrowed_rows: those that leave something out.
            choosing_rows: those that choose in this step, and see what it covers; None: all.

        Returns:
            Those that reuse layers must check.
        """
        ids = ((row, row_ids[row]) for row in narrowed_rows if row < len(row_ids))
        self._narrowed = {row: name for row, name in ids if name is not None}
        self._choosing = choosing_rows
        self._checked = [row for row, name in self._narrowed.items() if self._is_due(name)]
        return self._checked

    def _is_due(self, request_id: str) -> bool:
        if not self._floor:
            return False
        state = self._requests.setdefault(request_id, _Request())
        state.steps += 1
        if state.steps <= FIRST_CHECKS or state.low_checks:
            return True
        return (state.steps - 1) % self._interval_steps == 0

    def _take_in(self, recalls: list[list[float]]) -> None:
        for (row, request_id), values in zip(self._narrowed.items(), recalls, strict=True):
            is_checked = row in self._checked
            has_chosen = self._choosing is None or row in self._choosing
            for kind, value in zip(KINDS, values, strict=True):
                if is_checked if kind == KINDS[SERVED] else has_chosen:
                    self._count(kind, value)
            if is_checked:
                self._guard(self._requests[request_id], values[SERVED])

    def _count(self, kind: str, value: float) -> None:
        self.sums[kind] += value
        place = next((i for i, bound in enumerate(BOUNDS) if value <= bound), len(BOUNDS))
        self.histograms[kind][place] += 1
        last = self.ema.get(kind, value)
        self.ema[kind] = last + EMA_WEIGHT * (value - last)

    def _guard(self, state: _Request, served: float) -> None:
        state.low_checks = state.low_checks + 1 if served < self._floor else 0
        if state.low_checks >= self._patience and state.level < 2:
            state.level += 1
            # The raised budget is checked at once; a dense request never again.
            state.low_checks = 0
            state.steps = 0
            self.actions["raised" if state.level == 1 else "dense"] += 1

    def guarded(
        self, row_ids: Sequence[str | None], options: Mapping[int, RowOptions]
    ) -> dict[int, RowOptions]:
        """The rows' options, changed for those that the guard has taken over."""
        result = dict(options)
        for row, request_id in enumerate(row_ids if self._requests else ()):
            state = self._requests.get(request_id or "")
            if state is None or not state.level:
                continue
            asked = result.get(row, RowOptions())
            if state.level == 2:
                result[row] = replace(asked, is_dense=True, is_guarded=True)
            else:
                result[row] = _raised(asked)
        return result

    def forget(self, request_ids: Iterable[str]) -> None:
        """Requests that ended."""
        for request_id in request_ids:
            self._requests.pop(request_id, None)


def _raised(asked: RowOptions) -> RowOptions:
    if asked.budget_tokens is not None:
        budget_tokens = int(asked.budget_tokens * RAISED_FACTOR)
        return replace(asked, budget_tokens=budget_tokens, is_guarded=True)
    factor = asked.budget_factor * RAISED_FACTOR
    return replace(asked, budget_factor=factor, is_guarded=True)
