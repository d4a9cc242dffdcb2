"""What managers that free share: gaps become null blocks, and what is freed and held is counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvcache.adapter.figures import figure_files

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import KVCacheBlock

    from kvcache.retention import BlockRange

FREED = ("vllm_ext:kv_blocks_freed", "KV blocks returned to the pool by retention policies.")
EVICTED = ("vllm_ext:kv_tokens_evicted", "Tokens whose keys and values were evicted, per group.")
HELD = ("vllm_ext:kv_blocks_held", "KV blocks that requests hold under a retention policy.")


class FreeingManager:
    """Put before a manager of vLLM in the bases.

    Args:
        kv_cache_spec: one of ours.
        kwargs: as the manager takes them.
    """

    block_pool: BlockPool
    block_size: int
    kv_cache_group_id: int
    req_to_blocks: Any
    _remove_blocks_in_range: Any

    def __init__(self, kv_cache_spec: Any, **kwargs: Any) -> None:
        stock: Any = super()
        stock.__init__(kv_cache_spec, **kwargs)
        self.num_freed_blocks = 0  # since the start, while their requests went on
        self.num_held_blocks = 0  # by requests, now; shared ones counted for each
        group = str(self.kv_cache_group_id)
        self._labels = {"group": group, "policy": kv_cache_spec.policy.identity}

    def new_step_starts(self) -> None:
        """vLLM's hook before every step: shows what is held."""
        stock: Any = super()
        stock.new_step_starts()
        self._show_held()

    def _show_held(self) -> None:
        if (files := figure_files()) is not None:
            files.set_part(*HELD, self._labels, self.num_held_blocks)

    def add_local_computed_blocks(self, request_id: str, *args: Any, **kwargs: Any) -> None:
        """vLLM's; gaps of a prefix hit are not held."""
        stock: Any = super()
        stock.add_local_computed_blocks(request_id, *args, **kwargs)
        self.num_held_blocks += live_blocks(self.req_to_blocks[request_id])

    def allocate_new_blocks(self, *args: Any, **kwargs: Any) -> list[KVCacheBlock]:
        """vLLM's, counted."""
        stock: Any = super()
        blocks: list[KVCacheBlock] = stock.allocate_new_blocks(*args, **kwargs)
        self.num_held_blocks += len(blocks)
        return blocks

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """vLLM's; no step may follow an engine's last request, so what is held is shown here."""
        stock: Any = super()
        blocks: list[KVCacheBlock] = stock.pop_blocks_for_free(request_id)
        self.num_held_blocks -= live_blocks(blocks)
        self._show_held()
        return blocks

    def free_gap(self, request_id: str, gap: BlockRange) -> None:
        """Returns a request's blocks of this range to the pool, as far as they are there."""
        if not len(gap) or request_id not in self.req_to_blocks:
            return
        blocks = self.req_to_blocks[request_id]
        first = min(gap.last, len(blocks))  # what was removed before ends in a null block
        while first > gap.first and not blocks[first - 1].is_null:
            first -= 1
        free_before = self.block_pool.get_num_free_blocks()
        self._remove_blocks_in_range(request_id, gap.first, gap.last)
        self.num_held_blocks -= max(0, min(gap.last, len(blocks)) - first)
        freed = self.block_pool.get_num_free_blocks() - free_before
        if freed:
            self._count(freed)

    def _count(self, freed_blocks: int) -> None:
        self.num_freed_blocks += freed_blocks
        if (files := figure_files()) is not None:
            files.add_to_counter(*FREED, self._labels, freed_blocks)
            files.add_to_counter(*EVICTED, self._labels, freed_blocks * self.block_size)


def live_blocks(blocks: Sequence[KVCacheBlock]) -> int:
    """How many are no null blocks."""
    return sum(not block.is_null for block in blocks)
