"""Which KV blocks a request keeps: policies as plain arithmetic on tokens and blocks.

Positions never move: an evicted block leaves a gap in the request's block table, and what is
kept stays where it was (keys are cached after RoPE).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class BlockRange:
    """Logical blocks ``[first, last)`` of a request; empty where ``last <= first``."""

    first: int
    last: int

    def __len__(self) -> int:
        return max(0, self.last - self.first)


class RetentionPolicy(Protocol):
    """What a request may forget, and what it needs in order to go on."""

    @property
    def identity(self) -> str:
        """Names the policy and its parameters; equal identities mean equal KV content."""
        ...

    @property
    def caches_generated(self) -> bool:
        """Whether blocks of generated tokens may serve later prompts."""
        ...

    def evictable(self, num_computed_tokens: int, block_size: int) -> BlockRange:
        """Blocks that no later query may read.

        Args:
            num_computed_tokens: tokens whose keys and values are final; the next query's
                position.
            block_size: tokens per block.
        """
        ...

    def max_held_blocks(self, in_flight_tokens: int, max_model_len: int, block_size: int) -> int:
        """The most blocks a request ever holds at once.

        Args:
            in_flight_tokens: tokens that may be scheduled beyond the final ones: frees lag
                behind by that much.
            max_model_len: longest request, tokens.
            block_size: tokens per block.
        """
        ...

    def tail_blocks_for_hit(self, block_size: int) -> int:
        """Contiguous blocks before a position without which a request cannot go on from it."""
        ...


@dataclass(frozen=True)
class KeepAll:
    """Keeps every block.

    Attributes:
        caches_generated: whether blocks of generated tokens may serve later prompts. False for
            methods whose decode is sparse: what they generate, they compute from sparse hidden
            states, and a later prompt would have computed it densely.
    """

    caches_generated: bool = True

    @property
    def identity(self) -> str:
        """See ``RetentionPolicy.identity``."""
        return "all" if self.caches_generated else "all-prompts-cached"

    def evictable(self, num_computed_tokens: int, block_size: int) -> BlockRange:
        """See ``RetentionPolicy.evictable``: nothing."""
        return BlockRange(0, 0)

    def max_held_blocks(self, in_flight_tokens: int, max_model_len: int, block_size: int) -> int:
        """See ``RetentionPolicy.max_held_blocks``."""
        return -(-max_model_len // block_size)

    def tail_blocks_for_hit(self, block_size: int) -> int:
        """See ``RetentionPolicy.tail_blocks_for_hit``: all that there are."""
        return 1 << 30


@dataclass(frozen=True)
class SinkWindowRetention:
    """Keeps the blocks of the first ``sink_tokens`` and of the last ``window_tokens``.

    StreamingLLM's cache (arXiv 2309.17453) with original positions; sinks are kept in whole
    blocks, the window until its last token has left it.

    Attributes:
        sink_tokens: 0 or more.
        window_tokens: what a query may see, itself included; 1 or more.
        caches_generated: see ``KeepAll``; False where other layers decode sparsely.

    Raises:
        ValueError: a value out of its range.
    """

    sink_tokens: int
    window_tokens: int
    caches_generated: bool = True

    def __post_init__(self) -> None:
        if self.sink_tokens < 0:
            raise ValueError(f"sink_tokens is {self.sink_tokens}; it must be at least 0")
        if self.window_tokens < 1:
            raise ValueError(f"window_tokens is {self.window_tokens}; it must be at least 1")

    @property
    def identity(self) -> str:
        """See ``RetentionPolicy.identity``."""
        cached = "" if self.caches_generated else "-prompts-cached"
        return f"sink{self.sink_tokens}-window{self.window_tokens}{cached}"

    def sink_blocks(self, block_size: int) -> int:
        """Blocks at the start that are always kept."""
        return -(-self.sink_tokens // block_size)

    def evictable(self, num_computed_tokens: int, block_size: int) -> BlockRange:
        """See ``RetentionPolicy.evictable``: the gap between sinks and window."""
        # The next query, at position n, sees tokens from n - window + 1 on.
        first_seen = max(0, num_computed_tokens - self.window_tokens + 1)
        return BlockRange(self.sink_blocks(block_size), first_seen // block_size)

    def max_held_blocks(self, in_flight_tokens: int, max_model_len: int, block_size: int) -> int:
        """See ``RetentionPolicy.max_held_blocks``."""
        everything = -(-max_model_len // block_size)
        live_tokens = self.window_tokens - 1 + in_flight_tokens
        # One more: the window may start and end inside a block.
        live_blocks = -(-live_tokens // block_size) + 1
        return min(everything, self.sink_blocks(block_size) + live_blocks)

    def tail_blocks_for_hit(self, block_size: int) -> int:
        """See ``RetentionPolicy.tail_blocks_for_hit``."""
        return -(-(self.window_tokens - 1) // block_size)


def usable_prefix(
    is_cached: list[bool], sink_blocks: int, tail_blocks: int
) -> tuple[int, BlockRange]:
    """The longest prefix from which a gapped request can go on.

    A prefix of ``n`` blocks is usable if its sink blocks and its last ``tail_blocks`` blocks
    (those that lie behind the sinks) are all cached; the gap between them is not needed.

    Args:
        is_cached: per logical block, as many as may be hit.
        sink_blocks: blocks that every prefix needs.
        tail_blocks: see ``RetentionPolicy.tail_blocks_for_hit``.

    Returns:
        The number of blocks in the prefix, and those of them that are not needed.
    """
    sinks = 0
    while sinks < min(sink_blocks, len(is_cached)) and is_cached[sinks]:
        sinks += 1
    if sinks < sink_blocks:
        return sinks, BlockRange(sinks, sinks)
    run = 0  # cached blocks in a row, from the right
    for block in range(len(is_cached) - 1, sink_blocks - 1, -1):
        run = run + 1 if is_cached[block] else 0
        if run and run >= tail_blocks:
            return block + run, BlockRange(sink_blocks, block)
    return sink_blocks + run, BlockRange(sink_blocks, sink_blocks)
