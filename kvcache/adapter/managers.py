"""KV cache managers: they free what the policy lets go, and hit only what can go on.

Registered through the platform's ``register_custom_kv_cache_specs``. Prefix caching: a hit
needs the sink blocks and a live tail as long as the span at its end; the gap between them is null
blocks. Keys of the cache carry the group id, and one group has one policy, so that blocks of
one policy are never found by another or by a dense group; a server has one policy for all
requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from vllm.v1.core.kv_cache_utils import KVCacheBlock, resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, SlidingWindowManager
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from kvcache.adapter.freeing import FreeingManager, live_blocks
from kvcache.adapter.specs import AfterPromptSpec, KeepAllSpec, SpanSpec
from kvcache.retention import usable_prefix

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.request import Request


class PromptEnds:
    """Where requests' own prompts end, for managers that keep what is generated out of the cache.

    vLLM's number of prompt tokens does not say it for streaming-input sessions: when a chunk
    arrives, it turns what was generated before into prompt. A request is known from its first
    chunk on, through preemptions, until it is gone.
    """

    def __init__(self) -> None:
        self._by_request: WeakKeyDictionary[Request, int] = WeakKeyDictionary()

    def cacheable_tokens(self, request: Request, num_tokens: int) -> int:
        """Tokens, of the first ``num_tokens``, that nothing generated stands before."""
        return min(num_tokens, self._by_request.setdefault(request, request.num_prompt_tokens))


class SpanManager(FreeingManager, SlidingWindowManager):
    """Keeps sinks and span of every request; frees the gap while it forms."""

    kv_cache_spec: SpanSpec

    def __init__(self, kv_cache_spec: SpanSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self._policy = kv_cache_spec.policy
        self._prompt_ends = PromptEnds()

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """vLLM's; up to the end of the prompt where the policy says so."""
        if not self._policy.caches_generated:
            num_tokens = self._prompt_ends.cacheable_tokens(request, num_tokens)
        super().cache_blocks(request, num_tokens, *args, **kwargs)

    def get_num_skipped_tokens(self, num_computed_tokens: int) -> int:
        """0: no *head* of a request is ever skipped, its sinks stay.

        vLLM's callers would cut the sinks off otherwise; the gap is in the list of computed
        blocks as null blocks already.
        """
        return 0

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        *args: Any,
        apply_admission_cap: bool = False,
        **kwargs: Any,
    ) -> int:
        """vLLM's count; at admission, the most that a request of this length will hold, less
        what it gets by a prefix hit (whose gap is not held).

        vLLM's own cap is the longest request's. This one is not below what a request holds before
        it generates, and never above vLLM's, so that whatever fits an empty pool is admitted.
        """
        if not apply_admission_cap or request_id in self.req_to_blocks:
            needed: int = super().get_num_blocks_to_allocate(
                request_id,
                num_tokens,
                new_computed_blocks,
                *args,
                apply_admission_cap=apply_admission_cap,
                **kwargs,
            )
            return needed
        missing = -(-num_tokens // self.block_size) - len(new_computed_blocks)
        may_add = self.kv_cache_spec.held_blocks(num_tokens) - live_blocks(new_computed_blocks)
        evictable: int = self._get_num_evictable_blocks(new_computed_blocks)
        return min(missing, may_add) + evictable

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Frees the gap, during chunked prefill as well as in decode."""
        gap = self._policy.evictable(processed_computed_tokens, self.block_size)
        self.free_gap(request_id, gap)

    @classmethod
    def find_longest_cache_hit(  # type: ignore[override]
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: SpanSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """The longest prefix whose sinks and tail are cached, gaps as null blocks."""
        assert not drop_eagle_block, "speculative decoding is refused at start-up"
        assert dcp_world_size == pcp_world_size == 1, "context parallelism is refused at start-up"
        block_size, policy = kv_cache_spec.block_size, kv_cache_spec.policy
        hashes = resolve_block_hashes(
            block_hashes,
            block_pool.hash_block_size,
            block_size,
            supports_fine_grained_hash_lookup=cls.supports_fine_grained_hash_lookup,
            alignment_tokens=alignment_tokens,
        )
        found = [
            block_pool.get_cached_block(hashes[index], kv_cache_group_ids)
            for index in range(max_length // block_size)
        ]
        sinks = policy.sink_blocks(block_size)

        def tail(num_blocks: int) -> int:
            return policy.tail_blocks_for_hit(num_blocks * block_size, block_size)

        length, gap = usable_prefix([f is not None for f in found], sinks, tail)
        while length * block_size % alignment_tokens:
            known = [f is not None for f in found[: length - 1]]
            length, gap = usable_prefix(known, sinks, tail)
        blocks: tuple[list[KVCacheBlock], ...] = tuple([] for _ in kv_cache_group_ids)
        for index in range(length):
            cached = None if gap.first <= index < gap.last else found[index]
            for group, into in enumerate(blocks):
                into.append(block_pool.null_block if cached is None else cached[group])
        return blocks, length * block_size

    @classmethod
    def reachable_block_mask(cls, *args: Any, **kwargs: Any) -> list[bool] | None:
        """None: every block may serve a hit, as a sink or as somebody's tail."""
        return None


class _RereadingManager(FullAttentionManager):
    """Full attention, in which the last tokens of a request are computed even where they are
    cached, as many as the policy says.
    """

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: KeepAllSpec | AfterPromptSpec,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """vLLM's, of what may be hit. Tokens of whole blocks alone are counted, so that lookups of
        several groups, each limited by the one before, do not add up.
        """
        hashed_tokens = len(block_hashes) * block_pool.hash_block_size
        if kv_cache_spec.policy.reread_tokens:
            usable_tokens = max(0, hashed_tokens - kv_cache_spec.policy.reread_tokens)
            max_length = min(max_length, usable_tokens)
        found: tuple[tuple[list[KVCacheBlock], ...], int] = super().find_longest_cache_hit(
            block_hashes, max_length, kv_cache_group_ids, block_pool, kv_cache_spec, *args, **kwargs
        )
        return found


class KeepAllManager(_RereadingManager):
    """Full attention; generated blocks stay out of the prefix cache where the policy says so."""

    def __init__(self, kv_cache_spec: KeepAllSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self._caches_generated = kv_cache_spec.policy.caches_generated
        self._prompt_ends = PromptEnds()

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """vLLM's; up to the end of the prompt where the policy says so."""
        if not self._caches_generated:
            num_tokens = self._prompt_ends.cacheable_tokens(request, num_tokens)
        super().cache_blocks(request, num_tokens, *args, **kwargs)


class RoutedManager:
    """Put before a manager in the bases: what is known of requests' routes.

    A route is kept, through preemptions, until the request ends (``RoutingScheduler``).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._routes: dict[str, int] = {}

    def learn_route(self, request_id: str, route: int) -> None:
        """A route, once decided; whoever says it again says the same."""
        self._routes.setdefault(request_id, route)

    def forget_route(self, request_id: str) -> None:
        """The request ended."""
        self._routes.pop(request_id, None)

    def is_sparse(self, request_id: str, group: int | None) -> bool:
        """Whether a request reads nothing of its gap in a group of layers.

        Args:
            request_id: of the request.
            group: that a route decides about; None: none does.
        """
        if group is None:
            return True
        route = self._routes.get(request_id)
        return route is not None and not route >> group & 1


class AfterPromptManager(RoutedManager, FreeingManager, _RereadingManager):
    """Keeps prompts whole until they are computed, then frees between sinks and span; generated
    blocks stay out of the prefix cache.

    A request that asks for all of its context (``vllm_xargs.sparse: "off"`` in its first chunk)
    frees nothing, and where routes decide, none does before its own is known. vLLM shows requests
    to managers of a prefix cache alone, so that front ends refuse the option where there is none.
    """

    def __init__(self, kv_cache_spec: AfterPromptSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self._policy = kv_cache_spec.policy
        self._prompt_ends = PromptEnds()
        self._wants_all: WeakKeyDictionary[Request, bool] = WeakKeyDictionary()
        self._whole: set[str] = set()  # of the requests that hold blocks, those that want all

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """vLLM's; up to the end of the prompt."""
        if self._wants_all.setdefault(request, asks_for_everything(_extra_args(request))):
            self._whole.add(request.request_id)
        num_tokens = self._prompt_ends.cacheable_tokens(request, num_tokens)
        super().cache_blocks(request, num_tokens, *args, **kwargs)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """vLLM's; a preempted request shows itself again."""
        self._whole.discard(request_id)
        return super().pop_blocks_for_free(request_id)

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Frees the gap once the prompt is final: no step in flight is of the prompt then.

        Of a streaming-input session vLLM counts earlier answers as prompt: frees wait until a
        chunk is read, and are made up for.
        """
        if num_prompt_tokens is None or request_id in self._whole:
            return
        if not self.is_sparse(request_id, self._policy.route):
            return
        self.free_gap(
            request_id,
            self._policy.evictable(processed_computed_tokens, num_prompt_tokens, self.block_size),
        )


def asks_for_everything(extra_args: Mapping[str, Any] | None) -> bool:
    """Whether a request's arguments ask to read all of its context in every layer. Managers free by
    it, and workers read by it.
    """
    return extra_args is not None and extra_args.get("sparse") == "off"


def _extra_args(request: Request) -> Mapping[str, Any] | None:
    return None if request.sampling_params is None else request.sampling_params.extra_args


def register() -> None:
    """Makes the specs known to vLLM; called again without effect."""
    KVCacheSpecRegistry.register(SpanSpec, SpanManager, SpanSpec)
    KVCacheSpecRegistry.register(KeepAllSpec, KeepAllManager, KeepAllSpec)
    KVCacheSpecRegistry.register(AfterPromptSpec, AfterPromptManager, AfterPromptSpec)
