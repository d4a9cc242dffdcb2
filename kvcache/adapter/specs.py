"""KV cache specs: what a KV entry keeps, as vLLM's sizing and admission see it.

An entry is a name with a spec, a layer or some of its heads; nothing here knows about layers.

vLLM puts what it can merge into one KV group, and ``FullAttentionSpec.merge`` looks at its own
fields only: it would merge two of our policies, or one of ours with a plain spec. So ours merge
with their equals alone, and where one entry frees or caches prompts only, all entries have specs
of ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    FullAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from kvcache.retention import AfterPrompt, KeepAll, RetentionPolicy, SpanRetention

if TYPE_CHECKING:
    from typing import Self

    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec


class _OnePolicyPerGroup:
    """Put before a spec of vLLM in the bases: keeps entries of different policies apart."""

    policy: RetentionPolicy

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """One spec for equal ones.

        Raises:
            AssertionError: they differ; what vLLM's callers take for "not mergeable".
        """
        if any(spec != specs[0] for spec in specs):
            raise AssertionError("entries of one KV group must have equal specs")
        return specs[0]

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Whether all entries may share one group and its block table."""
        return all(
            type(spec) is type(self) and spec.policy == self.policy
            for spec in kv_cache_specs.values()
        )


@dataclass(frozen=True, kw_only=True)
class SpanSpec(_OnePolicyPerGroup, SlidingWindowSpec):
    """Sinks and a span that may grow with the position.

    It is a ``SlidingWindowSpec`` because vLLM caps the admission of those alone to what they
    really hold; a ``FullAttentionSpec`` that frees would be admitted as if it did not. Of the
    base, ``sliding_window`` is the longest request's span; whatever reads it in vLLM (block
    events, KV connectors, the base of our manager) takes it for a window that holds at every
    position.

    Attributes:
        policy: what is kept.
        in_flight_tokens: ``VllmConfig.max_in_flight_tokens``; vLLM tells it to this spec's
            ``max_admission_blocks_per_request``, but not to the manager.
    """

    policy: SpanRetention
    in_flight_tokens: int

    def held_blocks(self, num_tokens: int) -> int:
        """The most blocks a request of so many tokens holds at once."""
        return self.policy.held_blocks(num_tokens, self.in_flight_tokens, self.block_size)

    def max_admission_blocks_per_request(
        self, max_in_flight_tokens: int, max_model_len: int
    ) -> int:
        """What a request holds at most: pool sizing, admission and the run-time gate agree.

        Raises:
            ValueError: the engine has more tokens in flight than the spec was made for; requests
                would hold more than they were admitted with.
        """
        if max_in_flight_tokens > self.in_flight_tokens:
            raise ValueError(
                f"in_flight_tokens of the KV cache spec is {self.in_flight_tokens}, but the "
                f"engine has up to {max_in_flight_tokens}; make the spec with that many"
            )
        return self.held_blocks(max_model_len)


@dataclass(frozen=True, kw_only=True)
class KeepAllSpec(_OnePolicyPerGroup, FullAttentionSpec):
    """Keeps everything; which blocks enter the prefix cache, the policy says."""

    policy: KeepAll


@dataclass(frozen=True, kw_only=True)
class AfterPromptSpec(_OnePolicyPerGroup, FullAttentionSpec):
    """Frees behind the prompt. Full attention to vLLM: a request is admitted with all its tokens,
    which it holds when its prompt ends, and a hit needs every block.
    """

    policy: AfterPrompt


def with_policies(
    specs: Mapping[str, AttentionSpec],
    policies: Mapping[str, RetentionPolicy],
    in_flight_tokens: int,
    max_model_len: int,
) -> dict[str, AttentionSpec]:
    """The entries' specs under their policies.

    Args:
        specs: what the entries asked for, by name; plain full attention.
        policies: of ``kvcache.retention``, for each name.
        in_flight_tokens: see ``SpanSpec``.
        max_model_len: the longest request, tokens.

    Raises:
        TypeError: an entry is not plain full attention, or a policy is not known here.
    """
    for name, spec in specs.items():
        if type(spec) is not FullAttentionSpec:
            raise TypeError(
                f"retention needs full attention layers, {name} has {type(spec).__name__}"
            )
    if all(policies[name] == KeepAll() for name in specs):
        return dict(specs)
    return {
        name: _with_policy(spec, policies[name], in_flight_tokens, max_model_len)
        for name, spec in specs.items()
    }


def _with_policy(
    spec: AttentionSpec, policy: RetentionPolicy, in_flight_tokens: int, max_model_len: int
) -> AttentionSpec:
    shared: dict[str, Any] = {
        field.name: getattr(spec, field.name) for field in fields(AttentionSpec) if field.init
    }
    if isinstance(policy, SpanRetention):
        longest_span = policy.span.tokens(max_model_len)
        return SpanSpec(
            **shared,
            policy=policy,
            sliding_window=longest_span,
            in_flight_tokens=in_flight_tokens,
        )
    if isinstance(policy, KeepAll):
        return KeepAllSpec(**shared, policy=policy)
    if isinstance(policy, AfterPrompt):
        return AfterPromptSpec(**shared, policy=policy)
    raise TypeError(f"no KV cache spec for {policy}")


def policies_of(specs: Mapping[str, KVCacheSpec]) -> dict[str, RetentionPolicy | None]:
    """Under which policy each entry is, by name; None for specs that are none of ours."""
    return {name: _policy_of(spec) for name, spec in specs.items()}


def _policy_of(spec: KVCacheSpec) -> RetentionPolicy | None:
    if isinstance(spec, _OnePolicyPerGroup):
        return spec.policy
    return KeepAll() if type(spec) is FullAttentionSpec else None


def policies_of_groups(config: KVCacheConfig) -> list[dict[str, RetentionPolicy | None]]:
    """Per KV group that vLLM made, the policy of each entry in it, by name."""
    groups: list[dict[str, RetentionPolicy | None]] = []
    for group in config.kv_cache_groups:
        spec = group.kv_cache_spec
        if isinstance(spec, UniformTypeKVCacheSpecs):  # one spec per entry
            groups.append(policies_of(spec.kv_cache_specs))
        else:
            groups.append(policies_of(dict.fromkeys(group.layer_names, spec)))
    return groups
