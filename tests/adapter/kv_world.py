"""Random lives of requests on vLLM's KV cache manager, against a plain-Python model of it.

After every event: every block is free or held, reference counts are what the block tables say,
what must be kept is kept, what must be freed is freed, no request holds more than it was admitted
with, and every block that a request can read holds exactly that request's tokens. A prefix hit has
what the next query sees, and where decode is sparse, only what was computed densely.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import (
    get_kv_cache_groups,
    get_request_block_hasher,
    init_none_hash,
)
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request, StreamingUpdate

from kvcache.adapter.freeing import FreeingManager
from kvcache.adapter.managers import asks_for_everything, register
from kvcache.adapter.specs import policies_of_groups, with_policies
from kvcache.grouping import check_groups
from kvcache.retention import AfterPrompt, RetentionPolicy, SpanRetention
from kvcache.spans import Span
from tests.adapter.kv_routes import Routes


@dataclass(frozen=True)
class Scale:
    """Sizes of a world, tokens; up to ``steps_in_flight`` steps of a request overlap."""

    block: int = 4
    max_len: int = 120
    chunk: int = 24
    steps_in_flight: int = 1
    num_heads: int = 2

    @property
    def in_flight(self) -> int:
        """The most tokens of a request that are scheduled and not yet final."""
        return self.chunk * self.steps_in_flight


SMALL = Scale()


def manager_of(
    planned: Mapping[str, RetentionPolicy], num_blocks: int, caching: bool, scale: Scale
) -> tuple[KVCacheManager, list[RetentionPolicy]]:
    """vLLM's manager with the groups that vLLM makes of the entries, and each group's policy."""
    KVCacheSpecRegistry._ensure_registered()
    register()
    full = FullAttentionSpec(
        block_size=scale.block, num_kv_heads=scale.num_heads, head_size=16, dtype=torch.float32
    )
    specs = with_policies(dict.fromkeys(planned, full), planned, scale.in_flight, scale.max_len)
    vllm_config = VllmConfig()
    vllm_config.cache_config.kv_cache_layout = "LBHNC"
    groups = get_kv_cache_groups(vllm_config, specs)
    config = KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=groups)
    made = policies_of_groups(config)
    check_groups(planned, made)
    manager = KVCacheManager(
        config,
        max_model_len=scale.max_len,
        scheduler_block_size=scale.block,
        hash_block_size=scale.block,
        max_in_flight_tokens=scale.in_flight,
        enable_caching=caching,
    )
    policies = [policy for group in made for policy in {*group.values()} if policy is not None]
    return manager, policies


@dataclass
class Life:
    """A request and what has been computed of it."""

    request: Request
    num_computed: int = 0
    is_running: bool = False
    was_preempted: bool = False
    first_sparse: int = 1 << 30  # the first generated token that this run computed
    under_way: deque[int] = field(default_factory=deque)  # tokens of steps that have not ended
    prefixes: list[int] = field(default_factory=lambda: [0])  # by length: what its tokens are
    prompt_end: int = 0  # of its first chunk: what its own queries are behind
    wants_all: bool = False  # asked for in its first chunk: nothing of it is freed

    def __post_init__(self) -> None:
        self.prompt_end = self.request.num_prompt_tokens
        self.wants_all = asks_for_everything(self.request.sampling_params.extra_args)

    def prefix(self, num_tokens: int) -> int:
        """Names the first tokens: equal for requests that begin with the same ones."""
        tokens = self.request.all_token_ids
        for token in tokens[len(self.prefixes) - 1 : num_tokens]:
            self.prefixes.append(hash((self.prefixes[-1], token)))
        return self.prefixes[num_tokens]


class World:
    """A manager, its requests, and what every block holds."""

    def __init__(
        self,
        planned: Mapping[str, RetentionPolicy],
        seed: int,
        num_blocks: int,
        caching: bool,
        scale: Scale = SMALL,
    ) -> None:
        init_none_hash(sha256)
        self.num_blocks, self.scale = num_blocks, scale
        self.manager, self.policies = manager_of(planned, num_blocks, caching, scale)
        self.source = random.Random(seed)
        self.lives: list[Life] = []
        # By block id: whose heads it caches (a group), the prefix it ends, that one's length, and
        # whether all of it was computed densely.
        self.content: dict[int, tuple[int, int, int, bool]] = {}
        self.events: Counter[str] = Counter()
        self._hasher = get_request_block_hasher(scale.block, sha256)
        groups = {policy.route for policy in self.policies if isinstance(policy, AfterPrompt)}
        self.routes = Routes(self.manager, len(groups - {None}), random.Random(seed + 1))
        self._families = [[family] * (2 * scale.max_len // 3) for family in range(3)]

    def request(self, tokens: Sequence[int], extra_args: dict[str, Any] | None = None) -> Life:
        """A new request with this prompt."""
        request = Request(
            request_id=f"r{self.events['arrive']}",
            prompt_token_ids=list(tokens),
            sampling_params=SamplingParams(max_tokens=50, extra_args=extra_args),
            pooling_params=None,
            block_hasher=self._hasher,
        )
        self.lives.append(Life(request))
        self.routes.arrive(request)
        self.events["arrive"] += 1
        return self.lives[-1]

    def arrive(self) -> None:
        """A new prompt, often with a known beginning: a family's, or another's whole answer."""
        quarter = self.scale.max_len // 4
        known = self.source.choice(self._families)[: self.source.randrange(0, 2 * quarter)]
        if self.lives and self.source.random() < 0.3:
            known = list(self.source.choice(self.lives).request.all_token_ids)[: 3 * quarter]
        own = self.source.choices(range(100, 103), k=self.source.randrange(1, quarter))
        self.request(known + own, self._options())

    def _options(self) -> dict[str, Any] | None:
        """Now and then everything; only a prefix cache shows managers who asks for it."""
        asks = self.manager.enable_caching and self.source.random() < 0.2
        return {"sparse": "off"} if asks else None

    def step(self, life: Life) -> None:
        """One scheduled chunk or decode step; preempts others when the pool is full."""
        request = life.request
        if not self.schedule(life):
            victims = [other for other in self.lives if other.is_running and other is not life]
            assert victims, "a request alone does not fit the pool"
            self.stop(self.source.choice(victims), "preempt")
            return
        if life.num_computed == request.num_tokens:
            request.append_output_token_ids(self.source.randrange(100, 103))
            if request.num_tokens >= self.scale.max_len or self.source.random() < 0.02:
                self.stop(life, "finish")
            elif self.source.random() < 0.02:
                self.go_on(life)
        self.events["step"] += 1

    def schedule(self, life: Life) -> bool:
        """A chunk of the request, of any size; False where the pool has too few blocks."""
        request = life.request
        hit, num_hit = None, 0
        self.routes.begin()
        if not life.is_running:
            hit, num_hit, _ = self.manager.get_computed_blocks(request)
            self.events["hit" if num_hit else "miss"] += 1
            self.check_hit(life, hit.blocks, num_hit)
        self._settle(life)
        start = life.num_computed + num_hit
        chunks = (1, 3, self.scale.chunk, self.source.randint(1, self.scale.chunk))
        count = min(self.source.choice(chunks), request.num_tokens - start)
        request.num_computed_tokens = life.num_computed
        allocated = self.manager.allocate_slots(
            request, count, num_hit, hit, full_sequence_must_fit=not life.is_running
        )
        if allocated is None:
            return False
        self.events["resume"] += life.was_preempted and not life.is_running
        self.computed(life, start, count)
        return True

    def computed(self, life: Life, start: int, count: int) -> None:
        """A scheduled step: what it writes is there for every step after it."""
        life.is_running = True
        life.num_computed = life.request.num_computed_tokens = start + count
        life.under_way.append(count)
        self._write(life, start)
        if life.num_computed >= life.prompt_end and not life.wants_all:
            self.routes.decide(life.request.request_id)

    def _settle(self, life: Life) -> None:
        """Steps end, in order; as many may overlap as the engine has batches."""
        while life.under_way and (
            len(life.under_way) >= self.scale.steps_in_flight or self.source.random() < 0.3
        ):
            life.under_way.popleft()
        life.request.num_in_flight_tokens = sum(life.under_way)

    def go_on(self, life: Life) -> None:
        """The next chunk of a streaming-input session: vLLM makes prompt of what was generated."""
        own = [self.source.randrange(100, 103) for _ in range(self.source.randrange(1, 9))]
        if life.request.num_tokens + len(own) > self.scale.max_len:
            return
        scheduler: Any = SimpleNamespace(hash_block_size=self.scale.block, log_stats=False)
        params = SamplingParams(max_tokens=50, extra_args=self._options())  # void by now
        update = StreamingUpdate(
            mm_features=None,
            prompt_token_ids=own,
            max_tokens=50,
            arrival_time=0.0,
            sampling_params=params,
        )
        del life.prefixes[life.num_computed + 1 :]  # the last output goes before it is computed
        Scheduler._update_request_as_session(scheduler, life.request, update)
        self.events["go on"] += 1

    def stop(self, life: Life, how: str) -> None:
        """Frees a request; a preempted one starts again later."""
        self.manager.free(life.request)
        life.num_computed, life.is_running, life.first_sparse = 0, False, 1 << 30
        life.under_way.clear()
        life.request.num_computed_tokens = life.request.num_in_flight_tokens = 0
        life.was_preempted = True
        if how != "preempt":
            self.lives.remove(life)
            self.routes.end(life.request.request_id)
        self.events[how] += 1

    def _write(self, life: Life, start: int) -> None:
        block_size = self.scale.block
        if life.num_computed > life.request.num_prompt_tokens:
            generated = max(start, life.request.num_prompt_tokens)
            life.first_sparse = min(life.first_sparse, generated)
        for group, blocks in enumerate(self.tables(life)):
            for index in range(start // block_size, -(-life.num_computed // block_size)):
                assert not blocks[index].is_null, "a token was written into the null block"
                end = min((index + 1) * block_size, life.num_computed)
                is_dense = end <= life.first_sparse
                self.content[blocks[index].block_id] = (group, life.prefix(end), end, is_dense)

    def tables(self, life: Life) -> list[Any]:
        """The request's block table of every group."""
        managers = self.manager.coordinator.single_type_managers
        return [m.req_to_blocks.get(life.request.request_id, []) for m in managers]

    def check_hit(self, life: Life, hit: Any, num_hit: int) -> None:
        """What the next query sees is in the hit, and nothing that was computed sparsely."""
        for group, (policy, blocks) in enumerate(zip(self.policies, hit, strict=True)):
            assert num_hit == self.scale.block * len(blocks)
            reread_tokens = getattr(policy, "reread_tokens", 0)
            assert num_hit <= max(0, life.request.num_tokens - max(1, reread_tokens))
            self._check_readable(life, group, blocks, num_hit, num_hit)
            for block in blocks:
                is_dense = block.is_null or self.content[block.block_id][3]
                assert policy.caches_generated or is_dense, "computed sparsely, and served"

    def check(self) -> None:
        """The invariants."""
        held: Counter[int] = Counter()
        for life in self.lives:
            self.check_tables(life)
            for blocks in self.tables(life):
                held.update(b.block_id for b in blocks if not b.is_null)
        for manager in self.manager.coordinator.single_type_managers:
            if isinstance(manager, FreeingManager):
                live = (b for blocks in manager.req_to_blocks.values() for b in blocks)
                assert manager.num_held_blocks == sum(not block.is_null for block in live)
        pool = self.manager.block_pool
        for block in pool.blocks:
            assert block.is_null or block.ref_cnt == held[block.block_id]
        assert pool.get_num_free_blocks() + len(held) == self.num_blocks - 1

    def check_tables(self, life: Life) -> None:
        """What steps under way and the next one see is there, and no more than was admitted."""
        num_final = life.num_computed - sum(life.under_way)
        for group, (policy, blocks) in enumerate(
            zip(self.policies, self.tables(life), strict=True)
        ):
            assert life.is_running or not blocks
            self._check_readable(life, group, blocks, num_final, life.num_computed)
            if isinstance(policy, SpanRetention) and blocks:
                alive = sum(not block.is_null for block in blocks)
                in_flight, block_size = self.scale.in_flight, self.scale.block
                assert alive <= policy.held_blocks(life.num_computed, in_flight, block_size)

    def _check_readable(
        self, life: Life, group: int, blocks: Any, position: int, num_computed: int
    ) -> None:
        """Blocks that queries from a position on see hold this request's tokens, of these heads."""
        policy, seen_from, sinks = self.policies[group], 0, 0
        if isinstance(policy, SpanRetention):
            seen_from, sinks = _first_seen(policy.span, position), policy.span.sink_tokens
        if isinstance(policy, AfterPrompt) and self._is_narrow(life, policy, position):
            seen_from, sinks = _first_seen(policy.span, position), policy.span.sink_tokens
        for index, block in enumerate(blocks):
            first = index * self.scale.block
            end = min(first + self.scale.block, num_computed)
            if first < end and (first < sinks or end > seen_from):
                assert not block.is_null, f"block {index} is needed, and gone"
                assert self.content[block.block_id][:3] == (group, life.prefix(end), end)

    def _is_narrow(self, life: Life, policy: AfterPrompt, position: int) -> bool:
        """Whether queries from a position on see their span alone."""
        if position < life.prompt_end or life.wants_all:
            return False
        return not self.routes.is_whole(life.request.request_id, policy.route)


def _first_seen(span: Span, position: int) -> int:
    """By the definition: ``t`` is seen from position ``p`` iff ``t > p - span(p)``."""
    elastic = span.alpha_tokens + span.beta_64ths * (position + 1) // 64
    return position - max(span.floor_tokens, elastic) + 1


def read_and_generate(world: World, life: Life, tokens: range) -> None:
    """Reads what is left of a prompt, then generates these tokens."""
    request, manager = life.request, world.manager
    hit, num_hit = None, 0
    if not life.is_running:
        hit, num_hit, _ = manager.get_computed_blocks(request)
    while life.num_computed < request.num_tokens:
        start = life.num_computed + num_hit
        count = min(request.num_tokens - start, world.scale.chunk)
        assert manager.allocate_slots(request, count, num_hit, hit) is not None
        hit, num_hit = None, 0
        world.computed(life, start, count)
    for token in tokens:
        request.append_output_token_ids(token)
        assert manager.allocate_slots(request, 1) is not None
        world.computed(life, life.num_computed, 1)
