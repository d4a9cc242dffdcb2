"""What an implementation derives from a batch, made once for all layers that share the batch."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

from attn_backends.batch import PagedBatch

T = TypeVar("T")


class PerBatch(Generic[T]):
    """Keeps what was made for a batch as long as there is the batch: a step makes new ones."""

    def __init__(self) -> None:
        self._made: WeakKeyDictionary[PagedBatch, dict[Hashable, T]] = WeakKeyDictionary()

    def get(self, batch: PagedBatch, key: Hashable, make: Callable[[], T]) -> T:
        """What was made for this batch and key, else what ``make`` makes."""
        made = self._made.setdefault(batch, {})
        if key not in made:
            made[key] = make()
        return made[key]
