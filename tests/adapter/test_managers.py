"""Retention managers over random lives of requests, and their rules one by one; no engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from kvcache.adapter.figures import FOLDER_ENV, figure_files
from kvcache.adapter.freeing import HELD
from kvcache.retention import AfterPrompt, KeepAll, RetentionPolicy, SpanRetention
from kvcache.spans import Span
from tests.adapter.kv_lives import EVENTS, end, event
from tests.adapter.kv_world import SMALL, Scale, World, read_and_generate
from vllm_ext.metrics import WorkerFigures

BLOCK, MAX_LEN, CHUNK = SMALL.block, SMALL.max_len, SMALL.chunk
WINDOW = SpanRetention(Span(6, 13))
ELASTIC = SpanRetention(Span(4, 8, -10, 32))
ANSWERS = AfterPrompt(Span(6, 13))
POLICIES: dict[str, tuple[RetentionPolicy, ...]] = {
    "sinks-and-window": (WINDOW,),
    "window-only": (SpanRetention(Span(0, 5)),),
    "sinks-and-one-token": (SpanRetention(Span(8, 1)),),
    "elastic": (ELASTIC,),
    "prompts-cached": (KeepAll(caches_generated=False),),
    "full-and-window": (KeepAll(), SpanRetention(Span(4, 9))),
    "two-windows": (SpanRetention(Span(4, 9)), SpanRetention(Span(8, 21))),
    "policy": (KeepAll(False), SpanRetention(Span(4, 9), caches_generated=False)),
    "after-prompt": (ANSWERS,),
    "full-and-after-prompt": (KeepAll(False), ANSWERS, AfterPrompt(Span(0, 5))),
    "routed": (KeepAll(False, 9), *(AfterPrompt(Span(6, 13), group, 9) for group in (0, 1, None))),
    "forced": (AfterPrompt(Span(6, 13), 0), AfterPrompt(Span(4, 9), 1)),
    "full-and-spans": (KeepAll(), KeepAll(False), SpanRetention(Span(4, 9)), ELASTIC),
}


def _layers(policies: Sequence[RetentionPolicy]) -> dict[str, RetentionPolicy]:
    """One layer of each policy."""
    return {f"layer.{index}": policy for index, policy in enumerate(policies)}


def _world(*policies: RetentionPolicy, num_blocks: int = 200, scale: Scale = SMALL) -> World:
    return World(_layers(policies), seed=1, num_blocks=num_blocks, caching=True, scale=scale)


@pytest.mark.parametrize("caching", [True, False], ids=["prefix-cache", "no-prefix-cache"])
@pytest.mark.parametrize("name", POLICIES)
def test_ten_thousand_events_leave_nothing_lost_and_nothing_owned_twice(
    name: str, caching: bool
) -> None:
    policies = POLICIES[name]
    is_routed = any(isinstance(policy, AfterPrompt) and policy.route == 0 for policy in policies)
    # A request whole fits, and where routes keep requests whole, some more do.
    num_blocks = max(60, 50 * len(policies) if is_routed else 30 * len(policies))
    world = World(_layers(policies), seed=7, num_blocks=num_blocks, caching=caching)
    while world.events.total() < 10_000:
        event(world)
        world.check()
    assert EVENTS | ({"hit"} if caching else set()) <= set(world.events)
    for manager in world.manager.coordinator.single_type_managers:
        assert getattr(manager, "num_freed_blocks", 1), "a gap was never freed"
    end(world)


WIDE = SpanRetention(Span(64, 512))
GROWING = SpanRetention(Span(64, 128, -128, 24))
FULL_SIZE = Scale(block=32, max_len=1500, chunk=256, steps_in_flight=2, num_heads=1)


def test_a_gapped_request_holds_sinks_and_window_and_serves_a_hit() -> None:
    world = _world(WINDOW)
    first = world.request(range(101))
    while first.num_computed < 101:
        world.step(first)
    world.step(first)
    (blocks,) = world.tables(first)
    gap = [index for index, block in enumerate(blocks) if block.is_null]
    assert gap == list(range(2, (101 - 13 + 1) // BLOCK))
    world.stop(first, "finish")
    again = world.request(range(101))
    hit, num_hit, _ = world.manager.get_computed_blocks(again.request)
    assert num_hit == 100
    shown = [block.is_null for block in hit.blocks[0]]
    assert shown == [False] * 2 + [True] * (25 - 2 - 3) + [False] * 3  # 2 sinks, 12 tokens of tail
    other = world.request(list(range(60)) + [500] * 41)
    assert world.manager.get_computed_blocks(other.request)[1] == 60  # its tail is still there


def test_without_sinks_or_tail_there_is_no_hit() -> None:
    world = _world(WINDOW)
    first = world.request(range(101))
    while first.num_computed < 101:
        world.step(first)
    (blocks,) = world.tables(first)
    sinks, tail = blocks[1].block_id, blocks[-3].block_id
    world.stop(first, "finish")
    pool = world.manager.block_pool
    again = world.request(range(101))
    pool.evict_blocks({tail})
    assert world.manager.get_computed_blocks(again.request)[1] == (len(blocks) - 3) * BLOCK
    pool.evict_blocks({sinks})
    assert world.manager.get_computed_blocks(again.request)[1] == BLOCK


def test_a_shorter_prefix_of_an_elastic_span_needs_a_shorter_tail() -> None:
    world = _world(ELASTIC)
    first = world.request(range(101))
    read_and_generate(world, first, range(0))
    (blocks,) = world.tables(first)
    # The last chunk began at 96, whose span is 38 tokens.
    assert [index for index, block in enumerate(blocks) if block.is_null] == list(range(1, 14))
    world.stop(first, "finish")
    again = world.request(range(101))
    pool = world.manager.block_pool

    def hit_without(*indices: int) -> tuple[int, int]:
        """Length of the hit, tokens, and of its tail, blocks."""
        for index in indices:
            cached = pool.get_cached_block(again.request.block_hashes[index], [0])
            assert cached is not None
            pool.evict_blocks({cached[0].block_id})
        hit, num_hit, _ = world.manager.get_computed_blocks(again.request)
        return num_hit, sum(not block.is_null for block in hit.blocks[0]) - 1

    assert hit_without() == (100, 10)  # 40 tokens of span at position 100
    assert hit_without(24) == (96, 10)
    assert hit_without(23, 13) == (92, 9)  # 36 tokens: block 13, freed long ago, is not needed
    assert hit_without(14) == (52, 4)  # from here on freed blocks serve, those still there


def _first_chunk(world: World, num_tokens: int) -> bool:
    """Whether a request with this prompt is admitted."""
    life = world.request(range(num_tokens))
    count = min(num_tokens, world.scale.chunk)
    return (
        world.manager.allocate_slots(life.request, count, full_sequence_must_fit=True) is not None
    )


def test_admission_counts_what_is_really_held() -> None:
    held = WINDOW.held_blocks(101, CHUNK, BLOCK)
    assert held == 2 + -(-(12 + CHUNK) // BLOCK) + 1
    assert _first_chunk(_world(WINDOW, num_blocks=held + 1), 101)
    assert not _first_chunk(_world(WINDOW, num_blocks=held), 101)


@pytest.mark.parametrize("num_tokens", [100, 400, 1499])
def test_an_elastic_span_is_admitted_by_the_length_of_the_request(num_tokens: int) -> None:
    scale = replace(FULL_SIZE, steps_in_flight=1)
    held = GROWING.held_blocks(num_tokens, scale.chunk, scale.block)
    assert held <= GROWING.held_blocks(scale.max_len, scale.chunk, scale.block)
    assert _first_chunk(_world(GROWING, num_blocks=held + 1, scale=scale), num_tokens)
    assert not _first_chunk(_world(GROWING, num_blocks=held, scale=scale), num_tokens)


@pytest.mark.parametrize("policy", [WIDE, GROWING], ids=lambda policy: policy.identity)
@pytest.mark.parametrize("steps", [1, 2])
def test_what_was_admitted_is_read_to_its_end_in_the_blocks_it_was_admitted_with(
    policy: SpanRetention, steps: int
) -> None:
    """Five prompts in a pool that is exactly as large as admission says: none is ever refused."""
    scale = replace(FULL_SIZE, steps_in_flight=steps)
    prompts = [90, 511, 800, 1300, 1499]
    held = [policy.held_blocks(prompt, scale.in_flight, scale.block) for prompt in prompts]
    world = _world(policy, num_blocks=sum(held) + 1, scale=scale)
    lives = [world.request([family] * prompt) for family, prompt in enumerate(prompts)]
    while unread := [life for life in lives if life.num_computed < life.request.num_tokens]:
        for life in unread:
            assert world.schedule(life)
        world.check()


@pytest.mark.parametrize("policy", [WIDE, GROWING], ids=lambda policy: policy.identity)
def test_a_pool_for_the_longest_request_serves_every_request_alone(policy: SpanRetention) -> None:
    """Else it would wait for ever, or preempt itself; with a prefix hit as without one."""
    scale = replace(FULL_SIZE, max_len=700)
    held = policy.held_blocks(scale.max_len, scale.in_flight, scale.block)
    world = _world(policy, num_blocks=held + 1, scale=scale)
    for num_tokens in (1, 300, 699, 520, 699):
        life = world.request([7] * num_tokens)
        while life in world.lives and life.request.num_tokens < scale.max_len:
            world.step(life)
            world.check()
        if life in world.lives:
            world.stop(life, "abort")
    assert world.events["hit"] >= 2


@pytest.mark.parametrize(
    "policies",
    [
        pytest.param((KeepAll(False),), id="tidal"),
        pytest.param((KeepAll(False), ANSWERS), id="answers"),
        pytest.param((KeepAll(False), SpanRetention(Span(8, 12), False)), id="policy"),
    ],
)
@pytest.mark.parametrize("is_session", [False, True], ids=["request", "session"])
def test_generated_blocks_stay_out_of_the_cache_where_decode_is_sparse(
    policies: tuple[RetentionPolicy, ...], is_session: bool
) -> None:
    """A generates after its prompt, B's prompt is both, C hits what they left."""
    world = _world(*policies)
    first = world.request(range(41))
    read_and_generate(world, first, range(41, 60))
    if is_session:
        world.go_on(first)
        read_and_generate(world, first, range(0))
    answered = [*range(60), 900, 901]
    world.manager.free(first.request)
    second = world.request(answered)
    assert world.manager.get_computed_blocks(second.request)[1] == 40
    read_and_generate(world, second, range(0))
    world.manager.free(second.request)
    third = world.request([*answered, 902, 903])
    hit, num_hit, _ = world.manager.get_computed_blocks(third.request)
    assert num_hit == 60
    world.check_hit(third, hit.blocks, num_hit)


def test_generated_blocks_are_cached_where_decode_is_exact() -> None:
    for policy in (KeepAll(), WINDOW):
        world = _world(policy)
        first = world.request(range(41))
        read_and_generate(world, first, range(41, 62))
        world.manager.free(first.request)
        again = world.request([*range(60), 900, 901])
        assert world.manager.get_computed_blocks(again.request)[1] == 60


def test_what_is_held_is_shown_when_no_step_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER_ENV, str(tmp_path))
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    world = _world(WINDOW)

    def shown() -> list[float]:
        families = WorkerFigures(tmp_path).collect()
        return [s.value for f in families if f.name == HELD[0] for s in f.samples]

    first = world.request(range(50))
    read_and_generate(world, first, range(0))
    world.manager.new_step_starts()
    assert shown() == [2 + 4]  # sinks, and what the last chunk of two tokens may see
    world.manager.free(first.request)
    assert shown() == [0]
    files = figure_files()
    assert files is not None
    files.close()
