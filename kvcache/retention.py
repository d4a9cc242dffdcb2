"""Which KV blocks a request keeps: policies as plain arithmetic on tokens and blocks.

Positions never move: an evicted block leaves a gap in the request's block table, and what is
kept stays where it was (keys are cached after RoPE).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from kvcache.spans import Span


@dataclass(frozen=True)
class BlockRange:
    """Logical blocks ``[first, last)`` of a request; empty where ``last <= first``."""

    first: int
    last: int

    def __len__(self) -> int:
        return max(0, self.last - self.first)


class RetentionPolicy(Protocol):
    """What every policy says of itself; what frees blocks says more (``SpanRetention``).

    Policies are hashable and equal where they do the same.
    """

    @property
    def identity(self) -> str:
        """Names the policy and its parameters; equal identities mean equal KV content."""
        ...

    @property
    def caches_generated(self) -> bool:
        """Whether blocks of generated tokens may serve later prompts. False where decode is
        sparse: keys and values of generated tokens come from sparse hidden states then, and a
        later prompt would have computed them densely.
        """
        ...


@dataclass(frozen=True)
class KeepAll:
    """Keeps every block.

    Attributes:
        caches_generated: see ``RetentionPolicy.caches_generated``.
        reread_tokens: last tokens of a request that are computed even where they are cached: what
            their queries attend is evidence.
    """

    caches_generated: bool = True
    reread_tokens: int = 0

    @property
    def identity(self) -> str:
        """See ``RetentionPolicy.identity``."""
        return "all" + _cached(self.caches_generated)


@dataclass(frozen=True)
class SpanRetention:
    """Keeps what a later query may see: the sinks, in whole blocks, and the span behind them.

    A plain window is StreamingLLM's cache (arXiv 2309.17453) with original positions.

    Attributes:
        span: what a query sees, by its position.
        caches_generated: see ``RetentionPolicy.caches_generated``.
    """

    span: Span
    caches_generated: bool = True

    @property
    def identity(self) -> str:
        """See ``RetentionPolicy.identity``."""
        return str(self.span) + _cached(self.caches_generated)

    def sink_blocks(self, block_size: int) -> int:
        """Blocks at the start that are always kept."""
        return -(-self.span.sink_tokens // block_size)

    def evictable(self, num_computed_tokens: int, block_size: int) -> BlockRange:
        """Blocks that no later query may read: the gap between sinks and span.

        Args:
            num_computed_tokens: tokens whose keys and values are final; the next query's
                position.
            block_size: tokens per block.
        """
        first_seen = self.span.first_seen(num_computed_tokens + 1)
        return BlockRange(self.sink_blocks(block_size), first_seen // block_size)

    def held_blocks(self, num_tokens: int, in_flight_tokens: int, block_size: int) -> int:
        """The most blocks a request ever holds while its first ``num_tokens`` are computed, in
        chunks of any size; it never falls as tokens are added.

        Args:
            num_tokens: 1 or more.
            in_flight_tokens: most tokens that are scheduled and not yet final, a step's own
                included: frees lag behind by that much.
            block_size: tokens per block.
        """
        # With p tokens final, the span of the next one and min(in_flight, n - p) tokens from it
        # on are held. The span grows by at most one per token, so most are held when the last
        # in_flight tokens start.
        num_final = max(0, num_tokens - in_flight_tokens)
        live_tokens = self.span.tokens(num_final + 1) - 1 + in_flight_tokens
        # One more: what is live may start and end inside a block.
        live_blocks = -(-live_tokens // block_size) + 1
        return min(-(-num_tokens // block_size), self.sink_blocks(block_size) + live_blocks)

    def tail_blocks_for_hit(self, prefix_tokens: int, block_size: int) -> int:
        """Contiguous blocks at the end of a prefix without which a request cannot go on from it.

        Args:
            prefix_tokens: whole blocks.
            block_size: tokens per block.
        """
        return -(-(self.span.tokens(prefix_tokens + 1) - 1) // block_size)


@dataclass(frozen=True)
class AfterPrompt:
    """Keeps everything until the prompt is computed; then the sinks, in whole blocks, and the span
    of the answer's queries.

    Queries of the prompt see everything, so that a prefix hit needs all of it: where a gap is gone
    from the cache, a hit ends. What is generated never serves a later prompt, which would have
    been computed densely.

    Attributes:
        span: what a query behind the prompt sees, by its position.
        route: group of layers that a request's route may make full: nothing is freed then, nor
            before the route is known. None: no route has a say.
        reread_tokens: see ``KeepAll``.
    """

    span: Span
    route: int | None = None
    reread_tokens: int = 0

    @property
    def caches_generated(self) -> bool:
        """See ``RetentionPolicy.caches_generated``."""
        return False

    @property
    def identity(self) -> str:
        """See ``RetentionPolicy.identity``."""
        routed = "" if self.route is None else f"-route{self.route}"
        return f"prompt-then-{self.span}{routed}" + _cached(self.caches_generated)

    def evictable(
        self, num_computed_tokens: int, prompt_tokens: int, block_size: int
    ) -> BlockRange:
        """Blocks that no later query may read.

        Args:
            num_computed_tokens: tokens whose keys and values are final; the next query's
                position.
            prompt_tokens: of the request, or more: queries from there on have the span.
            block_size: tokens per block.
        """
        if num_computed_tokens < prompt_tokens:
            return BlockRange(0, 0)
        return self.behind.evictable(num_computed_tokens, block_size)

    @cached_property
    def behind(self) -> SpanRetention:
        """What holds behind the prompt."""
        return SpanRetention(self.span, self.caches_generated)


def _cached(caches_generated: bool) -> str:
    return "" if caches_generated else "-prompts-cached"


def usable_prefix(
    is_cached: Sequence[bool], sink_blocks: int, tail_blocks: Callable[[int], int]
) -> tuple[int, BlockRange]:
    """The longest prefix from which a gapped request can go on.

    A prefix of ``n`` blocks is usable if its sink blocks and its last ``tail_blocks(n)`` blocks
    (those that lie behind the sinks, and at least the last one) are all cached; the gap between
    them is not needed.

    Args:
        is_cached: per logical block, as many as may be hit.
        sink_blocks: blocks that every prefix needs.
        tail_blocks: of a prefix of so many blocks; see ``SpanRetention.tail_blocks_for_hit``.

    Returns:
        The number of blocks in the prefix, and those of them that are not needed.
    """
    sinks = 0
    while sinks < min(sink_blocks, len(is_cached)) and is_cached[sinks]:
        sinks += 1
    if sinks < sink_blocks:
        return sinks, BlockRange(sinks, sinks)
    runs = [0]  # by blocks behind the sinks: how many of the last ones are cached in a row
    for block in range(sinks, len(is_cached)):
        runs.append(runs[-1] + 1 if is_cached[block] else 0)
    for behind in range(len(runs) - 1, 0, -1):
        tail = max(1, min(tail_blocks(sinks + behind), behind))
        if runs[behind] >= tail:
            return sinks + behind, BlockRange(sinks, sinks + behind - tail)
    return sinks, BlockRange(sinks, sinks)
