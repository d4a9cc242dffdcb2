"""Parts of an order of layers that fill an engine's KV groups: full, routed, window."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

from attn_backends.head_classes import group_sizes, padded_entries

MOST_ROUTED = 3  # groups: each has a router to fit, and a KV group's cost in each step


@dataclass(frozen=True)
class Split:
    """An order of layers in parts: always full, routed groups, and always window.

    Attributes:
        num_full: layers that are always full, the first ones.
        sizes: layers of each routed group, those that come next.
    """

    num_full: int
    sizes: tuple[int, ...]

    def numbers(self) -> list[int]:
        """Of full layers, at each depth."""
        return [self.num_full + sum(self.sizes[:depth]) for depth in range(len(self.sizes) + 1)]

    def groups(self, order: Sequence[int]) -> list[list[int]]:
        """The routed groups' layers."""
        numbers = self.numbers()
        return [sorted(order[first:end]) for first, end in pairwise(numbers)]


def unit_layers(num_layers: int) -> int:
    """Layers of which all parts are multiples, so that no KV group is padded."""
    return next(group_sizes(num_layers))


def static_layers(num_layers: int, share: float) -> int:
    """The most full layers within a share, whose KV groups are not padded."""
    numbers = range(1, max(2, int(share * num_layers + 1e-9) + 1))
    return max(n for n in numbers if n == 1 or not padded_entries([n, num_layers - n]))


def splits(num_layers: int, share: float) -> Iterator[Split]:
    """All that can have this mean share of full layers, with some layers always full and some
    always window; none where the layers make too few equal groups.
    """
    unit = unit_layers(num_layers)
    num_units = num_layers // unit
    for num_full in range(1, num_units):
        for number in range(1, MOST_ROUTED + 1):
            for sizes in product(range(1, num_units - num_full), repeat=number):
                num_window = num_units - num_full - sum(sizes)
                can_share = num_full < share * num_units < num_full + sum(sizes)
                # Multiples of a unit that no part has alone may be padded to the smallest part.
                if (
                    num_window > 0
                    and can_share
                    and not padded_entries([num_full, *sizes, num_window])
                ):
                    yield Split(num_full * unit, tuple(size * unit for size in sizes))
