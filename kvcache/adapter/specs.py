"""KV cache specs: what a KV entry keeps, as vLLM's sizing and admission see it.

An entry is a name with a spec, usually a layer; nothing here knows about layers.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, SlidingWindowSpec

from kvcache.retention import KeepAll, RetentionPolicy, SinkWindowRetention

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheSpec


@dataclass(frozen=True, kw_only=True)
class SinkWindowSpec(SlidingWindowSpec):
    """Sinks and a window: ``sliding_window`` is the window, ``sink_tokens`` come on top.

    It is a ``SlidingWindowSpec`` because vLLM caps the admission of those alone to what they
    really hold; a ``FullAttentionSpec`` that frees would be admitted as if it did not.
    """

    sink_tokens: int = 0
    caches_prompts_only: bool = False  # see ``PromptCachedSpec``

    @property
    def policy(self) -> SinkWindowRetention:
        """The arithmetic behind the spec."""
        return SinkWindowRetention(
            self.sink_tokens, self.sliding_window, not self.caches_prompts_only
        )

    def max_admission_blocks_per_request(
        self, max_in_flight_tokens: int, max_model_len: int
    ) -> int:
        """What a request holds at most: pool sizing, admission and the run-time gate agree."""
        return self.policy.max_held_blocks(max_in_flight_tokens, max_model_len, self.block_size)

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Whether all entries may share one group and its block table."""
        return all(
            isinstance(spec, SinkWindowSpec) and spec.policy == self.policy
            for spec in kv_cache_specs.values()
        )


@dataclass(frozen=True, kw_only=True)
class PromptCachedSpec(FullAttentionSpec):
    """Keeps everything, but only prompt blocks enter the prefix cache.

    For methods whose decode is sparse: keys and values of generated tokens come from sparse
    hidden states, and must not be served to a later prompt that would have computed them
    densely.
    """


def with_retention(spec: AttentionSpec, policy: RetentionPolicy) -> AttentionSpec:
    """The entry's spec under a policy.

    Args:
        spec: what the layer asked for; plain full attention.
        policy: of ``kvcache.retention``.

    Raises:
        TypeError: the entry is not plain full attention, or the policy is not known here.
    """
    if type(spec) is not FullAttentionSpec:
        raise TypeError(f"retention needs full attention layers, got {type(spec).__name__}")
    shared: dict[str, Any] = {
        field.name: getattr(spec, field.name) for field in fields(AttentionSpec) if field.init
    }
    if isinstance(policy, SinkWindowRetention):
        return SinkWindowSpec(
            **shared,
            sliding_window=policy.window_tokens,
            sink_tokens=policy.sink_tokens,
            caches_prompts_only=not policy.caches_generated,
        )
    if isinstance(policy, KeepAll):
        return spec if policy.caches_generated else PromptCachedSpec(**shared)
    raise TypeError(f"no KV cache spec for {policy}")
