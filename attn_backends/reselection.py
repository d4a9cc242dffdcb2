"""Selections that are kept for several decode steps.

What anchors read to score all keys is most of what a sparse step still reads. With
``reselect_steps`` = n a row selects anew at positions that n divides and reads its kept selection
in between (TidalDecode and Kascade select in every step). Its neighbours in the batch change
nothing about that, and n divides the KV block, so that a new block begins with a new selection:
the block of the current token, and all recent ones, are always read. A row whose options, reason
or budget change selects at once.

Logical blocks stay what they are when a request is preempted, and so does its kept selection.
But what a step computes as prefill is not selected in: with n > 1 a preemption may move one
selection by up to n steps, and a preempted request whose slot another took selects when it is
back.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch

from attn_backends.batch import BlockSelection
from attn_backends.plan import KeptRows


@dataclass(frozen=True)
class KeptStep:
    """What a step does with kept selections: the rows that choose anew, and each anchor's."""

    due_rows: list[int]
    by_anchor: dict[int, KeptRows]  # by layer index


class SelectionKeeper:
    """Which rows choose anew in a step, and where the others' selections lie.

    Args:
        reselect_steps: positions from one choice to the next, at least 2.
        budget_kind: what the server's budget of a length follows from; another kind than before
            chooses anew.
        anchors: indices of the layers that choose.
        shape: of a selection buffer, ``[max_num_reqs, num_kv_heads, max_blocks]``.
        device: of the buffers.
    """

    def __init__(
        self,
        reselect_steps: int,
        budget_kind: Callable[[int], Hashable],
        anchors: Iterable[int],
        shape: tuple[int, int, int],
        device: torch.device,
    ) -> None:
        self._stores = {layer: BlockSelection.empty(shape, device) for layer in anchors}
        self._reselect_steps, self._budget_kind = reselect_steps, budget_kind
        self._device = device
        self._slots: dict[str, int] = {}
        self._free = list(range(shape[0]))
        self._chosen: dict[str, tuple[int, Hashable]] = {}  # position and key, by request

    def begin_step(
        self, row_ids: Sequence[str], seq_lens: Sequence[int], keys: Sequence[Hashable]
    ) -> KeptStep:
        """Called once per step.

        Args:
            row_ids: request ids of the decode rows.
            seq_lens: their tokens, the current one included.
            keys: what a row's budget depends on besides its length; another key than before
                chooses anew.
        """
        rows = zip(row_ids, seq_lens, keys, strict=True)
        due_rows = [
            row
            for row, (name, seq_len, key) in enumerate(rows)
            if self._is_due(name, seq_len, (key, self._budget_kind(seq_len)))
        ]
        due = torch.tensor(due_rows, device=self._device) if due_rows else None
        slots = torch.tensor(
            [self._slot(name, row_ids) for name in row_ids], dtype=torch.int64, device=self._device
        )
        stores = self._stores.items()
        return KeptStep(due_rows, {layer: KeptRows(due, slots, own) for layer, own in stores})

    def _is_due(self, name: str, seq_len: int, key: Hashable) -> bool:
        position = seq_len - 1
        start = position - position % self._reselect_steps
        last, last_key = self._chosen.get(name, (-1, None))
        if start <= last <= position and key == last_key:
            return False
        self._chosen[name] = (position, key)
        return True

    def _slot(self, name: str, running: Sequence[str]) -> int:
        if name not in self._slots:
            if not self._free:  # a preempted request gives way, and chooses anew when it is back
                self.forget([next(held for held in self._slots if held not in running)])
            self._slots[name] = self._free.pop()
        return self._slots[name]

    def forget(self, request_ids: Iterable[str]) -> None:
        """Requests that ended."""
        for name in request_ids:
            self._chosen.pop(name, None)
            if name in self._slots:
                self._free.append(self._slots.pop(name))
