"""KV heads in few classes: as many block tables as an engine has KV groups, and none padded.

vLLM makes groups of equally many entries, as many in each as the rarest kind of entry has, and pads
the last group of a kind. So the size of the smallest class must divide all others; every group more
costs scheduling time in each step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from statistics import fmean

from kvcache.spans import Span, covering, everything

MAX_CLASSES = 8


def padded_entries(counts: Sequence[int]) -> int:
    """Entries that a paged engine adds to make its groups equally large.

    Args:
        counts: entries of each kind.
    """
    size = _group_size(counts)
    return sum(-count % size for count in counts)


def num_groups(counts: Sequence[int]) -> int:
    """KV groups that a paged engine makes.

    Args:
        counts: entries of each kind.
    """
    size = _group_size(counts)
    return sum(-(-count // size) for count in counts)


def _group_size(counts: Sequence[int]) -> int:
    smallest, largest = min(counts), max(counts)
    return largest if largest < 1.5 * smallest else smallest  # vLLM's rule


def require_unpadded(counts: Sequence[int]) -> None:
    """Refuses classes whose KV groups would be padded, or that are too many.

    Args:
        counts: KV heads of each class.

    Raises:
        ValueError: says which counts would do.
    """
    if len(counts) > MAX_CLASSES:
        raise ValueError(f"{len(counts)} classes of KV heads; at most {MAX_CLASSES}")
    smallest = min(counts)
    if padded_entries(counts):
        raise ValueError(
            f"classes of {', '.join(map(str, counts))} KV heads would be padded to equal groups; "
            f"the size of the smallest ({smallest}) must divide all others"
        )
    if sum(counts) // smallest > MAX_CLASSES:
        raise ValueError(
            f"{sum(counts)} KV heads in groups of {smallest}, the smallest class, are "
            f"{sum(counts) // smallest} KV groups; at most {MAX_CLASSES}: make that class larger"
        )


def group_sizes(num_heads: int) -> Iterator[int]:
    """Sizes of equal groups of heads that are not too many, ascending."""
    for size in range(-(-num_heads // MAX_CLASSES), num_heads + 1):
        if num_heads % size == 0:
            yield size


def covered_in_classes(spans: Sequence[Span], max_tokens: int) -> list[Span]:
    """A span for each head that shows it at least what its own does, few of them different.

    Heads are sorted by how much they see and cut into equal classes, the smallest ones that are
    not too many; a class keeps what any of its heads sees.

    Args:
        spans: of all KV heads of a model.
        max_tokens: of the longest request.
    """

    def seen(head: int) -> float:
        lengths = range(max(1, max_tokens // 8), max_tokens + 1, max(1, max_tokens // 8))
        return fmean(min(1.0, spans[head].tokens(n) / n) for n in lengths)

    order = sorted(range(len(spans)), key=seen)
    for size in group_sizes(len(spans)):
        result = [everything()] * len(spans)
        for first in range(0, len(spans), size):
            heads = order[first : first + size]
            cover = covering([spans[head] for head in heads], max_tokens)
            for head in heads:
                result[head] = cover
        if not padded_entries(list(Counter(result).values())):
            break
    return result
