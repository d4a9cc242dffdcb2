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

import torch

from attn_backends.batch import BlockSelection


class SelectionKeeper:
    """Which rows select anew in a step, and where the others' selections lie.

    Args:
        reselect_steps: positions from one selection to the next, at least 2.
        budget_of: what the server's budget of a length follows from; another such thing than
            before selects anew.
        shape: of a selection buffer, ``[max_num_reqs, num_kv_heads, max_blocks]``.
        device: of the buffers.
    """

    def __init__(
        self,
        reselect_steps: int,
        budget_of: Callable[[int], Hashable],
        shape: tuple[int, int, int],
        device: torch.device,
    ) -> None:
        self.stores: dict[str, BlockSelection] = {}
        self._reselect_steps, self._budget_of = reselect_steps, budget_of
        self._shape, self._device = shape, device
        self._slots: dict[str, int] = {}
        self._free = list(range(shape[0]))
        self._selected: dict[str, tuple[int, Hashable]] = {}  # position and key, by request
        self._step = -1
        self._due: list[int] = []

    def add_layer(self, name: str) -> None:
        """Makes the store of an anchor layer."""
        blocks = torch.full(self._shape, -1, dtype=torch.int32, device=self._device)
        counts = torch.zeros(self._shape[:2], dtype=torch.int32, device=self._device)
        self.stores[name] = BlockSelection(blocks, counts)

    def begin_step(
        self, step: int, row_ids: Sequence[str], seq_lens: Sequence[int], keys: Sequence[Hashable]
    ) -> tuple[list[int], list[int]]:
        """Called once per step and KV group; the calls of a step give the same answer.

        Args:
            step: any number that differs from step to step.
            row_ids: request ids of the decode rows.
            seq_lens: their tokens, the current one included.
            keys: what a row's budget depends on besides its length; another key than before
                selects anew.

        Returns:
            The rows that select anew, and each row's slot.
        """
        if step != self._step:
            self._step = step
            rows = zip(row_ids, seq_lens, keys, strict=True)
            self._due = [
                row
                for row, (name, seq_len, key) in enumerate(rows)
                if self._is_due(name, seq_len, (key, self._budget_of(seq_len)))
            ]
        return self._due, [self._slot(name, row_ids) for name in row_ids]

    def _is_due(self, name: str, seq_len: int, key: Hashable) -> bool:
        position = seq_len - 1
        start = position - position % self._reselect_steps
        last, last_key = self._selected.get(name, (-1, None))
        if start <= last <= position and key == last_key:
            return False
        self._selected[name] = (position, key)
        return True

    def _slot(self, name: str, running: Sequence[str]) -> int:
        if name not in self._slots:
            if not self._free:  # a preempted request gives way, and selects anew when it is back
                self.forget([next(held for held in self._slots if held not in running)])
            self._slots[name] = self._free.pop()
        return self._slots[name]

    def forget(self, request_ids: Iterable[str]) -> None:
        """Requests that ended."""
        for name in request_ids:
            self._selected.pop(name, None)
            if name in self._slots:
                self._free.append(self._slots.pop(name))
