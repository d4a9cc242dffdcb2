"""How many long requests one KV pool holds at once: one figure for ``doctor``, for the server's log
and for ``bench capacity``.

vLLM's own "maximum concurrency" charges every request a whole step in flight, as if all were
reading their prompts in the same step. A step's tokens are shared: while one request has a chunk in
flight, the others decode, and hold what their spans show.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

from kvcache.adapter.specs import AfterPromptSpec, SpanSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, KVCacheSpec


@dataclass(frozen=True)
class Concurrency:
    """Requests of one length in one pool.

    Attributes:
        request_tokens: prompt and answer of each.
        held: how many fit, under what is freed.
        dense: how many would if nothing were freed, and groups were not padded.
        chunk_tokens: of prompts, in flight at most; all steps that overlap together.
        routed_groups: KV groups that may be freed or not, by a request's route; counted as if
            every request kept them, as it is admitted.
    """

    request_tokens: int
    held: float
    dense: float
    chunk_tokens: int
    routed_groups: int = 0

    def __str__(self) -> str:
        return (
            f"{self.held:.1f} requests of {self.request_tokens} tokens at once in this pool, dense "
            f"{self.dense:.1f}; up to {self.chunk_tokens} prompt tokens in flight{self._routed}"
        )

    @property
    def _routed(self) -> str:
        if not self.routed_groups:
            return ""
        return f"; {self.routed_groups} routed KV groups counted as full, more fit as routes free"


def concurrency(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> Concurrency:
    """How many requests of the greatest length the pool holds: one has a chunk of its prompt in
    flight, the others decode.
    """
    request_tokens = vllm_config.model_config.max_model_len
    groups = kv_cache_config.kv_cache_groups
    specs = [_one_spec(group.kv_cache_spec) for group in groups]
    usable_blocks = kv_cache_config.num_blocks - 1  # one is the null block

    in_flight_tokens = vllm_config.max_in_flight_tokens
    reading = sum(_read_blocks(spec, request_tokens, in_flight_tokens) for spec in specs)
    in_flight_tokens = vllm_config.max_concurrent_batches  # a token of each step
    decoding = sum(_decode_blocks(spec, request_tokens, in_flight_tokens) for spec in specs)
    return Concurrency(
        request_tokens,
        held=min(usable_blocks / reading, 1.0) + max(0, usable_blocks - reading) / decoding,
        dense=usable_blocks / (-(-request_tokens // specs[0].block_size) * _full_groups(groups)),
        chunk_tokens=min(vllm_config.max_in_flight_tokens, request_tokens),
        routed_groups=sum(_is_routed(spec) for spec in specs),
    )


def _is_routed(spec: KVCacheSpec) -> bool:
    return isinstance(spec, AfterPromptSpec) and spec.policy.route is not None


def _full_groups(groups: Sequence[KVCacheGroupSpec]) -> float:
    """How many groups of the largest one's size the entries fill; vLLM pads the others."""
    sizes = [len(group.layer_names) for group in groups]
    return sum(sizes) / max(sizes)


def _one_spec(spec: KVCacheSpec) -> KVCacheSpec:
    """A group's spec; of layers that differ in other things than what is kept, any."""
    if isinstance(spec, UniformTypeKVCacheSpecs):
        return next(iter(spec.kv_cache_specs.values()))
    return spec


def _read_blocks(spec: KVCacheSpec, num_tokens: int, in_flight_tokens: int) -> int:
    """Held at most while a prompt is read."""
    if isinstance(spec, SpanSpec):
        return spec.policy.held_blocks(num_tokens, in_flight_tokens, spec.block_size)
    return -(-num_tokens // spec.block_size)


def _decode_blocks(spec: KVCacheSpec, num_tokens: int, in_flight_tokens: int) -> int:
    """Held behind the prompt."""
    if isinstance(spec, AfterPromptSpec) and spec.policy.route is None:
        return spec.policy.behind.held_blocks(num_tokens, in_flight_tokens, spec.block_size)
    return _read_blocks(spec, num_tokens, in_flight_tokens)
