"""Prompts that are whole until they are computed, one rule at a time; random lives of requests are
in test_managers.py.
"""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from kvcache.retention import AfterPrompt, KeepAll, RetentionPolicy
from kvcache.spans import Span
from tests.adapter.kv_world import SMALL, World, read_and_generate

BLOCK = SMALL.block
ANSWERS = AfterPrompt(Span(6, 13))


def _small_world(*policies: RetentionPolicy) -> World:
    planned = {f"layer.{index}": policy for index, policy in enumerate(policies)}
    return World(planned, seed=1, num_blocks=200, caching=True)


def test_a_prompt_is_whole_until_it_is_computed_and_its_gap_ends_later_hits() -> None:
    world = _small_world(KeepAll(False), ANSWERS)
    first = world.request(range(101))
    read_and_generate(world, first, range(0))
    assert all(not block.is_null for blocks in world.tables(first) for block in blocks)
    read_and_generate(world, first, range(200, 201))
    kept, gapped = world.tables(first)
    assert not any(block.is_null for block in kept)
    gap = [index for index, block in enumerate(gapped) if block.is_null]
    assert gap == list(range(2, (101 - 13 + 1) // BLOCK))  # from the first decode row on
    manager = world.manager.coordinator.single_type_managers[1]
    assert manager.num_freed_blocks == len(gap)
    again = world.request(range(101))
    assert world.manager.get_computed_blocks(again.request)[1] == 100  # freed, and still there
    gone = world.manager.block_pool.get_cached_block(again.request.block_hashes[5], [1])
    assert gone is not None
    world.manager.block_pool.evict_blocks({gone[0].block_id})
    assert world.manager.get_computed_blocks(again.request)[1] == 5 * BLOCK  # in all groups


def test_frees_wait_for_steps_of_the_prompt_that_are_in_flight() -> None:
    world = _small_world(ANSWERS)
    first = world.request(range(101))
    read_and_generate(world, first, range(0))
    (blocks,) = world.tables(first)
    for in_flight, num_gone in ((6, 0), (1, 20)):  # the last chunk; its token alone
        first.request.append_output_token_ids(7)
        first.request.num_in_flight_tokens = in_flight
        assert world.manager.allocate_slots(first.request, 1) is not None
        world.computed(first, first.num_computed, 1)
        assert sum(block.is_null for block in blocks) == num_gone


def test_a_request_that_wants_everything_keeps_it_also_after_a_preemption() -> None:
    world = _small_world(ANSWERS)
    first = world.request(range(81), {"sparse": "off"})
    for _ in range(2):
        read_and_generate(world, first, range(200, 210))
        (blocks,) = world.tables(first)
        assert len(blocks) > 20
        assert not any(block.is_null for block in blocks)
        world.stop(first, "preempt")
    read_and_generate(world, first, range(0))
    world.request(range(50))
    read_and_generate(world, world.lives[-1], range(200, 202))
    assert any(block.is_null for block in world.tables(world.lives[-1])[0])
    for life in list(world.lives):
        world.stop(life, "abort")
    assert world.manager.block_pool.get_num_free_blocks() == world.num_blocks - 1


def test_a_resumed_request_frees_while_it_computes_its_answer_again() -> None:
    world = _small_world(ANSWERS)
    first = world.request(range(41))
    read_and_generate(world, first, range(200, 260))
    world.stop(first, "preempt")
    hit, num_hit, _ = world.manager.get_computed_blocks(first.request)
    assert num_hit == 40
    for count in (1, 24, 24):
        assert world.manager.allocate_slots(first.request, count, num_hit, hit) is not None
        world.computed(first, first.num_computed + num_hit, count)
        first.under_way.clear()
        hit, num_hit = None, 0
        world.check()
    (blocks,) = world.tables(first)
    assert [i for i, block in enumerate(blocks) if block.is_null] == list(
        range(2, (41 + 24 - 13 + 1) // BLOCK)
    )
