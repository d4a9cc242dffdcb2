"""What an implementation derives from a batch, made once for all layers that share the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from attn_backends.batch import PagedBatch

T = TypeVar("T")

MAX_BATCHES = 16  # of one step: one for each KV group


class PerBatch(Generic[T]):
    """Keeps what was made for the last few batches, by identity: a step makes new ones."""

    def __init__(self) -> None:
        self._made: list[tuple[PagedBatch, object, T]] = []

    def get(self, batch: PagedBatch, key: object, make: Callable[[], T]) -> T:
        """What was made for this batch and key, else what ``make`` makes."""
        for known, its_key, value in self._made:
            if known is batch and its_key == key:
                return value
        value = make()
        self._made = [*self._made[1 - MAX_BATCHES :], (batch, key, value)]
        return value
