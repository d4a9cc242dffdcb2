"""Retention arithmetic: what is freed is needed no more, caps hold, hits have what they need."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.retention import AfterPrompt, BlockRange, KeepAll, SpanRetention, usable_prefix
from kvcache.spans import Span

SPANS = st.builds(
    Span,
    sink_tokens=st.integers(0, 40),
    floor_tokens=st.integers(1, 60),
    alpha_tokens=st.integers(-100, 100),
    beta_64ths=st.integers(0, 64),
)
BLOCK_SIZES = st.sampled_from([1, 2, 4, 16])
FLAGS = st.lists(st.booleans(), max_size=14)


def _sees(span: Span, position: int, token: int) -> bool:
    """The rule of ``Span``'s docstring, said once more."""
    elastic = span.alpha_tokens + span.beta_64ths * (position + 1) // 64
    return token < span.sink_tokens or token > position - max(span.floor_tokens, elastic)


@given(SPANS, BLOCK_SIZES, st.integers(0, 200))
def test_nothing_is_freed_that_a_later_query_sees(span: Span, block: int, computed: int) -> None:
    gap = SpanRetention(span).evictable(computed, block)
    for position in range(computed, computed + 40):
        for token in range(gap.first * block, gap.last * block):
            assert not _sees(span, position, token)


@given(SPANS, BLOCK_SIZES, st.integers(0, 200))
def test_a_block_that_nobody_sees_is_freed_at_once(span: Span, block: int, computed: int) -> None:
    gap = SpanRetention(span).evictable(computed, block)
    for index in range(computed // block):
        tokens = range(index * block, (index + 1) * block)
        is_needed = any(_sees(span, computed, token) for token in tokens)
        assert is_needed or gap.first <= index < gap.last


@given(SPANS, BLOCK_SIZES, st.integers(0, 200), st.integers(1, 200))
def test_behind_a_prompt_nothing_is_freed_that_is_seen_and_before_its_end_nothing(
    span: Span, block: int, computed: int, prompt: int
) -> None:
    gap = AfterPrompt(span).evictable(computed, prompt, block)
    assert len(gap) == 0 or computed >= prompt
    for token in range(gap.first * block, gap.last * block):  # of no query from here on
        assert span.sink_tokens <= token < span.first_seen(computed + 1)
    if computed >= prompt:  # and all of that
        for index in range(computed // block):
            tokens = range(index * block, (index + 1) * block)
            is_needed = any(_sees(span, computed, token) for token in tokens)
            assert is_needed or gap.first <= index < gap.last


def test_policies_of_one_span_are_told_apart() -> None:
    span = Span(64, 512)
    policies = (AfterPrompt(span), SpanRetention(span, caches_generated=False), KeepAll(False))
    assert len({policy.identity for policy in policies}) == 3
    assert not AfterPrompt(span).caches_generated


@settings(max_examples=400)
@given(SPANS, BLOCK_SIZES, st.integers(1, 300), st.integers(1, 100), st.integers())
def test_a_request_never_holds_more_than_its_cap(
    span: Span, block: int, prompt: int, in_flight: int, seed: int
) -> None:
    """Chunks of any size, steps that overlap, then decode; as vLLM orders frees and allocations."""
    policy, source = SpanRetention(span), random.Random(seed)
    held: set[int] = set()
    final, under_way = 0, 0
    while final + under_way < prompt + 20:
        num_tokens = max(prompt, final + under_way + 1)  # one token is generated at a time
        settled = source.randint(0, under_way)
        final, under_way = final + settled, under_way - settled
        gap = policy.evictable(final, block)
        held -= set(range(gap.first, gap.last))
        most = min(in_flight - under_way, num_tokens - final - under_way)
        under_way += source.choice((min(1, most), most, source.randint(min(1, most), most)))
        held |= set(range(-(-(final + under_way) // block))) - set(range(gap.first, gap.last))
        assert len(held) <= policy.held_blocks(num_tokens, in_flight, block)


@given(SPANS, BLOCK_SIZES, st.integers(1, 300), st.integers(1, 100))
def test_a_cap_is_not_above_the_worst_chunks_by_more_than_two_blocks(
    span: Span, block: int, prompt: int, in_flight: int
) -> None:
    policy, worst = SpanRetention(span), 0
    for final in range(prompt):
        gap = policy.evictable(final, block)
        reached = -(-min(final + in_flight, prompt) // block)
        worst = max(worst, reached - len(BlockRange(gap.first, min(gap.last, reached))))
    assert worst <= policy.held_blocks(prompt, in_flight, block) <= worst + 2


@given(SPANS, BLOCK_SIZES, st.integers(1, 300), st.integers(1, 100))
def test_a_cap_never_falls_as_a_request_grows(
    span: Span, block: int, num_tokens: int, in_flight: int
) -> None:
    policy = SpanRetention(span)
    assert policy.held_blocks(num_tokens, in_flight, block) <= policy.held_blocks(
        num_tokens + 1, in_flight, block
    )


@given(SPANS, BLOCK_SIZES, st.integers(0, 60))
def test_a_hit_has_all_that_later_queries_see(span: Span, block: int, num_blocks: int) -> None:
    policy, prefix = SpanRetention(span), num_blocks * block
    tail = policy.tail_blocks_for_hit(prefix, block)
    sinks = policy.sink_blocks(block)
    absent = range(sinks * block, max(sinks, num_blocks - tail) * block)
    assert not any(_sees(span, prefix, token) for token in absent)
    if sinks < num_blocks - tail + 1 <= num_blocks:  # one block fewer would not do
        last_absent = range((num_blocks - tail) * block, (num_blocks - tail + 1) * block)
        assert any(_sees(span, prefix, token) for token in last_absent)


def test_a_plain_window_is_what_it_always_was() -> None:
    policy = SpanRetention(Span(64, 1024))
    assert policy.identity == "sink64-window1024"
    assert SpanRetention(Span(64, 1024), False).identity == "sink64-window1024-prompts-cached"
    assert policy.evictable(2048, 32) == BlockRange(2, 32)  # the next query sees 1025 to 2048
    assert policy.tail_blocks_for_hit(4096, 32) == 32
    assert policy.held_blocks(8192, 2048, 32) == 2 + 96 + 1
    assert policy.held_blocks(1000, 2048, 32) == 32


def test_an_elastic_cap_follows_the_length() -> None:
    policy = SpanRetention(Span(64, 128, -128, 24))
    assert policy.identity == "sink64-window128-alpha-128-beta24"
    caps = [policy.held_blocks(num_tokens, 256, 32) for num_tokens in (256, 2048, 8192)]
    assert caps == [8, 2 + 25 + 1, 2 + 97 + 1]


def test_what_keeps_everything_says_what_it_caches() -> None:
    assert (KeepAll().identity, KeepAll(False).identity) == ("all", "all-prompts-cached")


def _longest_usable(is_cached: list[bool], sinks: int, tail: Callable[[int], int]) -> int:
    """The definition, tried on every length."""
    usable = [0]
    for length in range(1, len(is_cached) + 1):
        first_tail = max(sinks, length - max(1, tail(length)))
        needed = [*range(min(sinks, length)), *range(first_tail, length)]
        if all(is_cached[block] for block in needed):
            usable.append(length)
    return max(usable)


@given(FLAGS, st.integers(0, 5), st.lists(st.integers(0, 16), min_size=15, max_size=15))
def test_the_longest_usable_prefix_is_found(
    is_cached: list[bool], sinks: int, tails: list[int]
) -> None:
    length, gap = usable_prefix(is_cached, sinks, tails.__getitem__)
    assert length == _longest_usable(is_cached, sinks, tails.__getitem__)
    held = [block for block in range(length) if not gap.first <= block < gap.last]
    assert all(is_cached[block] for block in held)
    assert len(gap) == max(0, length - sinks - max(1, tails[length]))


def _from_the_right(is_cached: list[bool], sinks: int, tail: int) -> tuple[int, BlockRange]:
    """How constant tails used to be found: the first run from the right that is long enough."""
    start = next((b for b, cached in enumerate(is_cached[:sinks]) if not cached), None)
    if start is not None or len(is_cached) < sinks:
        found = len(is_cached) if start is None else start
        return found, BlockRange(found, found)
    run = 0
    for block in range(len(is_cached) - 1, sinks - 1, -1):
        run = run + 1 if is_cached[block] else 0
        if run and run >= tail:
            return block + run, BlockRange(sinks, block)
    return sinks + run, BlockRange(sinks, sinks)


@given(FLAGS, st.integers(0, 5), st.integers(0, 16))
def test_a_constant_tail_gives_the_prefixes_of_before(
    is_cached: list[bool], sinks: int, tail: int
) -> None:
    found = usable_prefix(is_cached, sinks, lambda _: tail)
    assert found == _from_the_right(is_cached, sinks, tail)


@pytest.mark.parametrize(
    ("cached", "length"),
    [("110000", 2), ("111000", 3), ("110011", 6), ("110110", 5), ("100111", 1), ("111011", 6)],
)
def test_a_prefix_needs_its_sinks_and_its_tail(cached: str, length: int) -> None:
    flags = [flag == "1" for flag in cached]
    assert usable_prefix(flags, 2, lambda _: 2)[0] == length
