"""Retention managers against a plain-Python model, over random lives of requests; no engine.

After every event: every block is free or held, reference counts are what the block tables
say, what must be kept is kept, what must be freed is freed, and every block that a request
can read holds exactly that request's tokens. Where decode is sparse, a block that came from the
prefix cache holds only what was computed densely.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request, StreamingUpdate

from kvcache.adapter.figures import FOLDER_ENV, figure_files
from kvcache.adapter.managers import HELD, SinkWindowManager, register
from kvcache.adapter.specs import SinkWindowSpec, with_retention
from kvcache.retention import KeepAll, RetentionPolicy, SinkWindowRetention
from vllm_ext.metrics import WorkerFigures

BLOCK, MAX_LEN, CHUNK = 4, 120, 24
FULL = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=16, dtype=torch.float32)
POLICIES: dict[str, tuple[RetentionPolicy, ...]] = {
    "sinks-and-window": (SinkWindowRetention(6, 13),),
    "window-only": (SinkWindowRetention(0, 5),),
    "sinks-and-one-token": (SinkWindowRetention(8, 1),),
    "prompts-cached": (KeepAll(caches_generated=False),),
    "full-and-window": (KeepAll(), SinkWindowRetention(4, 9)),
    "two-windows": (SinkWindowRetention(4, 9), SinkWindowRetention(8, 21)),
    "policy": (KeepAll(False), SinkWindowRetention(4, 9, caches_generated=False)),
}


def _manager(
    policies: tuple[RetentionPolicy, ...], num_blocks: int, caching: bool = True
) -> KVCacheManager:
    KVCacheSpecRegistry._ensure_registered()
    register()
    groups = [
        KVCacheGroupSpec([f"layer{index}"], with_retention(FULL, policy))
        for index, policy in enumerate(policies)
    ]
    return KVCacheManager(
        KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=groups),
        max_model_len=MAX_LEN,
        scheduler_block_size=BLOCK,
        hash_block_size=BLOCK,
        max_in_flight_tokens=CHUNK,
        enable_caching=caching,
    )


@dataclass
class Life:
    """A request and what has been computed of it."""

    request: Request
    num_computed: int = 0
    is_running: bool = False
    first_sparse: int = MAX_LEN  # the first generated token that this run computed


class World:
    """A manager, its requests, and what every block holds."""

    def __init__(
        self, policies: tuple[RetentionPolicy, ...], seed: int, num_blocks: int, caching: bool
    ) -> None:
        init_none_hash(sha256)
        self.policies, self.num_blocks = policies, num_blocks
        self.manager = _manager(policies, num_blocks, caching)
        self.source = random.Random(seed)
        self.lives: list[Life] = []
        # By block id: the prefix it ends, and whether all of that was computed densely.
        self.content: dict[int, tuple[tuple[int, ...], bool]] = {}
        self.events: Counter[str] = Counter()
        self._hasher = get_request_block_hasher(BLOCK, sha256)
        self._families = [[family] * 80 for family in range(3)]

    def arrive(self) -> None:
        """A new prompt, often with a known beginning: a family's, or another's whole answer."""
        known = self.source.choice(self._families)[: self.source.randrange(0, 70)]
        if self.lives and self.source.random() < 0.3:
            known = list(self.source.choice(self.lives).request.all_token_ids)[: MAX_LEN - 30]
        own = [self.source.randrange(100, 103) for _ in range(self.source.randrange(1, 30))]
        request = Request(
            request_id=f"r{self.events.total()}",
            prompt_token_ids=known + own,
            sampling_params=SamplingParams(max_tokens=50),
            pooling_params=None,
            block_hasher=self._hasher,
        )
        self.lives.append(Life(request))
        self.events["arrive"] += 1

    def step(self, life: Life) -> None:
        """One scheduled chunk or decode step; preempts others when the pool is full."""
        request = life.request
        hit, num_hit = None, 0
        if not life.is_running:
            hit, num_hit, _ = self.manager.get_computed_blocks(request)
            self.events["hit" if num_hit else "miss"] += 1
            self._check_hit(hit.blocks)
        start = life.num_computed + num_hit
        count = min(self.source.choice((1, 3, CHUNK)), request.num_tokens - start)
        request.num_computed_tokens = life.num_computed
        allocated = self.manager.allocate_slots(
            request, count, num_hit, hit, full_sequence_must_fit=not life.is_running
        )
        if allocated is None:
            victims = [other for other in self.lives if other.is_running and other is not life]
            if victims:
                self.stop(self.source.choice(victims), "preempt")
            return
        life.is_running = True
        life.num_computed = request.num_computed_tokens = start + count
        self._write(life, start)
        if life.num_computed == request.num_tokens:
            request.append_output_token_ids(self.source.randrange(100, 103))
            if request.num_tokens >= MAX_LEN or self.source.random() < 0.02:
                self.stop(life, "finish")
            elif self.source.random() < 0.02:
                self.go_on(life)
        self.events["step"] += 1

    def go_on(self, life: Life) -> None:
        """The next chunk of a streaming-input session: vLLM makes prompt of what was generated."""
        own = [self.source.randrange(100, 103) for _ in range(self.source.randrange(1, 9))]
        if life.request.num_tokens + len(own) > MAX_LEN:
            return
        scheduler: Any = SimpleNamespace(hash_block_size=BLOCK, log_stats=False)
        params = life.request.sampling_params
        update = StreamingUpdate(
            mm_features=None,
            prompt_token_ids=own,
            max_tokens=50,
            arrival_time=0.0,
            sampling_params=params,
        )
        Scheduler._update_request_as_session(scheduler, life.request, update)
        self.events["go on"] += 1

    def stop(self, life: Life, how: str) -> None:
        """Frees a request; a preempted one starts again later."""
        self.manager.free(life.request)
        life.num_computed, life.is_running, life.first_sparse = 0, False, MAX_LEN
        life.request.num_computed_tokens = 0
        if how != "preempt":
            self.lives.remove(life)
        self.events[how] += 1

    def _write(self, life: Life, start: int) -> None:
        tokens = tuple(life.request.all_token_ids)
        if life.num_computed > life.request.num_prompt_tokens:
            generated = max(start, life.request.num_prompt_tokens)
            life.first_sparse = min(life.first_sparse, generated)
        for blocks in self.tables(life):
            for index in range(start // BLOCK, -(-life.num_computed // BLOCK)):
                assert not blocks[index].is_null, "a token was written into the null block"
                end = min((index + 1) * BLOCK, life.num_computed)
                self.content[blocks[index].block_id] = (tokens[:end], end <= life.first_sparse)

    def _check_hit(self, hit: Any) -> None:
        for policy, blocks in zip(self.policies, hit, strict=True):
            for block in blocks:
                is_dense = block.is_null or self.content[block.block_id][1]
                assert policy.caches_generated or is_dense, "computed sparsely, and served"

    def tables(self, life: Life) -> list[Any]:
        """The request's block table of every group."""
        managers = self.manager.coordinator.single_type_managers
        return [m.req_to_blocks.get(life.request.request_id, []) for m in managers]

    def check(self) -> None:
        """The invariants."""
        held: Counter[int] = Counter()
        for life in self.lives:
            tokens = tuple(life.request.all_token_ids)
            for policy, blocks in zip(self.policies, self.tables(life), strict=True):
                assert life.is_running or not blocks
                held.update(b.block_id for b in blocks if not b.is_null)
                self._check_table(life, tokens, policy, blocks)
        for manager in self.manager.coordinator.single_type_managers:
            if isinstance(manager, SinkWindowManager):
                live = (b for blocks in manager.req_to_blocks.values() for b in blocks)
                assert manager.num_held_blocks == sum(not block.is_null for block in live)
        pool = self.manager.block_pool
        for block in pool.blocks:
            assert block.is_null or block.ref_cnt == held[block.block_id]
        assert pool.get_num_free_blocks() + len(held) == self.num_blocks - 1

    def _check_table(
        self, life: Life, tokens: tuple[int, ...], policy: RetentionPolicy, blocks: Any
    ) -> None:
        # What the next query may see must be there, and be this request's.
        seen_from, sinks = 0, 0
        if isinstance(policy, SinkWindowRetention):
            seen_from = max(0, life.num_computed - policy.window_tokens + 1)
            sinks = policy.sink_tokens
        for index, block in enumerate(blocks):
            first, end = index * BLOCK, min((index + 1) * BLOCK, life.num_computed)
            if first < end and (first < sinks or end > seen_from):
                assert not block.is_null, f"block {index} is needed, and gone"
                assert self.content[block.block_id][0][:end] == tokens[:end]
        alive = sum(not block.is_null for block in blocks)
        assert alive <= policy.max_held_blocks(CHUNK, MAX_LEN, BLOCK)


@pytest.mark.parametrize("caching", [True, False], ids=["prefix-cache", "no-prefix-cache"])
@pytest.mark.parametrize("name", POLICIES)
def test_ten_thousand_events_leave_nothing_lost_and_nothing_owned_twice(
    name: str, caching: bool
) -> None:
    world = World(POLICIES[name], seed=7, num_blocks=60, caching=caching)
    source = world.source
    while world.events.total() < 10_000:
        if len(world.lives) < 6 or (len(world.lives) < 9 and source.random() < 0.1):
            world.arrive()
        life = source.choice(world.lives)
        chance = source.random()
        if life.is_running and chance < 0.01:
            world.stop(life, "abort")
        elif life.is_running and chance < 0.02:
            world.stop(life, "preempt")
        else:
            world.step(life)
        world.check()
    wanted = {"arrive", "step", "miss", "preempt", "abort", "finish", "go on"}
    assert wanted | ({"hit"} if caching else set()) <= set(world.events)
    for life in list(world.lives):
        if life.is_running:
            world.stop(life, "abort")
    pool = world.manager.block_pool
    assert pool.get_num_free_blocks() == world.num_blocks - 1
    assert all(block.ref_cnt == 0 for block in pool.blocks if not block.is_null)


def _run(world: World, tokens: list[int]) -> Life:
    request = Request(
        request_id=f"r{len(world.lives)}",
        prompt_token_ids=tokens,
        sampling_params=SamplingParams(max_tokens=50),
        pooling_params=None,
        block_hasher=get_request_block_hasher(BLOCK, sha256),
    )
    life = Life(request)
    world.lives.append(life)
    return life


def test_a_gapped_request_holds_sinks_and_window_and_serves_a_hit() -> None:
    world = World((SinkWindowRetention(6, 13),), seed=1, num_blocks=200, caching=True)
    first = _run(world, list(range(101)))
    while first.num_computed < 101:
        world.step(first)
    world.step(first)
    (blocks,) = world.tables(first)
    gap = [index for index, block in enumerate(blocks) if block.is_null]
    assert gap == list(range(2, (101 - 13 + 1) // BLOCK))
    world.stop(first, "finish")
    again = _run(world, list(range(101)))
    hit, num_hit, _ = world.manager.get_computed_blocks(again.request)
    assert num_hit == 100
    shown = [block.is_null for block in hit.blocks[0]]
    assert shown == [False] * 2 + [True] * (25 - 2 - 3) + [False] * 3  # 2 sinks, 12 tokens of tail
    other = _run(world, list(range(60)) + [500] * 41)
    assert world.manager.get_computed_blocks(other.request)[1] == 60  # its tail is still there


def test_without_sinks_or_tail_there_is_no_hit() -> None:
    world = World((SinkWindowRetention(6, 13),), seed=1, num_blocks=200, caching=True)
    first = _run(world, list(range(101)))
    while first.num_computed < 101:
        world.step(first)
    (blocks,) = world.tables(first)
    sinks, tail = blocks[1].block_id, blocks[-3].block_id
    world.stop(first, "finish")
    pool = world.manager.block_pool
    again = _run(world, list(range(101)))
    pool.evict_blocks({tail})
    assert world.manager.get_computed_blocks(again.request)[1] == (len(blocks) - 3) * BLOCK
    pool.evict_blocks({sinks})
    assert world.manager.get_computed_blocks(again.request)[1] == BLOCK


def test_admission_counts_what_is_really_held() -> None:
    policy = SinkWindowRetention(6, 13)
    spec = with_retention(FULL, policy)
    assert isinstance(spec, SinkWindowSpec)
    cap = spec.max_admission_blocks_per_request(CHUNK, MAX_LEN)
    assert cap == 2 + -(-(12 + CHUNK) // BLOCK) + 1
    world = World((policy,), seed=1, num_blocks=cap + 1, caching=True)
    first = _run(world, list(range(101)))
    assert world.manager.allocate_slots(first.request, CHUNK, full_sequence_must_fit=True)
    world.manager.free(first.request)
    small = World((policy,), seed=1, num_blocks=cap, caching=True)
    second = _run(small, list(range(101)))
    refused = small.manager.allocate_slots(second.request, CHUNK, full_sequence_must_fit=True)
    assert refused is None


@pytest.mark.parametrize(
    "policies",
    [
        pytest.param((KeepAll(False),), id="tidal"),
        pytest.param((KeepAll(False), SinkWindowRetention(8, 12, False)), id="policy"),
    ],
)
@pytest.mark.parametrize("is_session", [False, True], ids=["request", "session"])
def test_generated_blocks_stay_out_of_the_cache_where_decode_is_sparse(
    policies: tuple[RetentionPolicy, ...], is_session: bool
) -> None:
    """A generates after its prompt, B's prompt is both, C hits what they left."""
    world = World(policies, seed=1, num_blocks=200, caching=True)
    first = _run(world, list(range(41)))
    _decode(world, first, range(41, 60))
    if is_session:
        world.go_on(first)
        _decode(world, first, range(0))
    answered = [*range(60), 900, 901]
    world.manager.free(first.request)
    second = _run(world, answered)
    assert world.manager.get_computed_blocks(second.request)[1] == 40
    _decode(world, second, range(0))
    world.manager.free(second.request)
    third = _run(world, [*answered, 902, 903])
    hit, num_hit, _ = world.manager.get_computed_blocks(third.request)
    assert num_hit == 60
    world._check_hit(hit.blocks)


def test_generated_blocks_are_cached_where_decode_is_exact() -> None:
    for policy in (KeepAll(), SinkWindowRetention(6, 13)):
        world = World((policy,), seed=1, num_blocks=200, caching=True)
        first = _run(world, list(range(41)))
        _decode(world, first, range(41, 62))
        world.manager.free(first.request)
        again = _run(world, [*range(60), 900, 901])
        assert world.manager.get_computed_blocks(again.request)[1] == 60


def _decode(world: World, life: Life, tokens: range) -> None:
    """Reads what is left of a prompt, then generates these tokens."""
    request, manager = life.request, world.manager
    hit, num_hit = None, 0
    if not life.is_running:
        hit, num_hit, _ = manager.get_computed_blocks(request)
    while life.num_computed < request.num_tokens:
        start = life.num_computed + num_hit
        count = min(request.num_tokens - start, CHUNK)
        assert manager.allocate_slots(request, count, num_hit, hit) is not None
        life.is_running, hit, num_hit = True, None, 0
        life.num_computed = request.num_computed_tokens = start + count
        world._write(life, start)
    for token in tokens:
        request.append_output_token_ids(token)
        assert manager.allocate_slots(request, 1) is not None
        life.num_computed = request.num_computed_tokens = request.num_tokens
        world._write(life, life.num_computed - 1)


def test_what_is_held_is_shown_when_no_step_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER_ENV, str(tmp_path))
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    world = World((SinkWindowRetention(6, 13),), seed=1, num_blocks=200, caching=True)

    def shown() -> list[float]:
        families = WorkerFigures(tmp_path).collect()
        return [s.value for f in families if f.name == HELD[0] for s in f.samples]

    first = _run(world, list(range(50)))
    _decode(world, first, range(0))
    world.manager.new_step_starts()
    assert shown() == [2 + 4]  # sinks, and what the last chunk of two tokens may see
    world.manager.free(first.request)
    assert shown() == [0]
    files = figure_files()
    assert files is not None
    files.close()


def test_only_plain_full_attention_is_retained() -> None:
    spec = with_retention(FULL, SinkWindowRetention(4, 8))
    with pytest.raises(TypeError, match="SinkWindowSpec"):
        with_retention(spec, SinkWindowRetention(4, 8))
