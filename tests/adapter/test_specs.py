"""What vLLM makes of our KV cache specs: groups, sizes, copies; no engine."""

from __future__ import annotations

import pickle
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.config import VllmConfig
from vllm.v1.core.kv_cache_utils import (
    get_kv_cache_groups,
    is_kv_cache_spec_uniform,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from attn_backends.head_classes import padded_entries
from kvcache.adapter.concurrency import concurrency
from kvcache.adapter.managers import register
from kvcache.adapter.specs import SpanSpec, policies_of, policies_of_groups, with_policies
from kvcache.grouping import check_groups
from kvcache.retention import AfterPrompt, KeepAll, RetentionPolicy, SpanRetention
from kvcache.spans import Span

HEAD = FullAttentionSpec(block_size=32, num_kv_heads=1, head_size=64, dtype=torch.float32)
IN_FLIGHT, MAX_LEN = 256, 8192
POLICIES: tuple[RetentionPolicy, ...] = (
    KeepAll(),
    KeepAll(caches_generated=False),
    SpanRetention(Span(64, 512)),
    SpanRetention(Span(64, 512), caches_generated=False),
    SpanRetention(Span(64, 128, -128, 24)),
    SpanRetention(Span(64, 128, -128, 8)),
    AfterPrompt(Span(64, 512)),
    AfterPrompt(Span(64, 128)),
)


@pytest.fixture(scope="module")
def vllm_config() -> VllmConfig:
    KVCacheSpecRegistry._ensure_registered()
    register()
    config = VllmConfig()
    config.cache_config.kv_cache_layout = "LBHNC"  # an engine chooses one; grouping asks for it
    return config


def _specs(
    planned: dict[str, RetentionPolicy], spec: FullAttentionSpec = HEAD
) -> dict[str, object]:
    return dict(with_policies(dict.fromkeys(planned, spec), planned, IN_FLIGHT, MAX_LEN))


@pytest.mark.parametrize(
    "counts", [(45, 45), (30, 60), (18,) * 5, (37, 29, 24), (70, 60, 126), (20, 25), (2, 3, 4)]
)
def test_padding_of_classes_is_foreseen(vllm_config: VllmConfig, counts: tuple[int, ...]) -> None:
    planned = {
        f"model.layers.{entry}.head{kind}": SpanRetention(Span(64, 512 + kind))
        for kind, count in enumerate(counts)
        for entry in range(count)
    }
    groups = get_kv_cache_groups(vllm_config, _specs(planned))
    size = max(len(group.layer_names) for group in groups)
    assert padded_entries(counts) == size * len(groups) - sum(counts)


@pytest.mark.parametrize("first", range(len(POLICIES)))
@pytest.mark.parametrize("num_heads", [1, 4], ids=["heads", "layers"])
def test_vllm_keeps_entries_of_different_policies_apart(
    vllm_config: VllmConfig, first: int, num_heads: int
) -> None:
    order = POLICIES[first:] + POLICIES[:first]
    planned = {
        f"model.layers.{layer}.attn.head{head}": policy
        for layer in range(6)
        for head, policy in enumerate(order)
    }
    specs = _specs(planned, replace(HEAD, num_kv_heads=num_heads))
    assert not is_kv_cache_spec_uniform(specs)
    groups = get_kv_cache_groups(vllm_config, specs)
    assert len(groups) == len(POLICIES)
    made = policies_of_groups(KVCacheConfig(0, [], groups))
    assert [set(group.values()) for group in made] == [{policy} for policy in order]
    check_groups(planned, made)


def test_entries_of_one_policy_share_a_group(vllm_config: VllmConfig) -> None:
    for policy in POLICIES:
        planned = {f"layer.{layer}": policy for layer in range(4)}
        groups = get_kv_cache_groups(vllm_config, _specs(planned))
        check_groups(planned, policies_of_groups(KVCacheConfig(0, [], groups)))
        assert len(groups) == 1


def test_entries_of_one_policy_and_different_pages_share_a_group(vllm_config: VllmConfig) -> None:
    planned = {f"layer.{layer}": POLICIES[4] for layer in range(4)}
    heads = {name: replace(HEAD, num_kv_heads=1 + i % 2) for i, name in enumerate(planned)}
    specs = dict(with_policies(heads, planned, IN_FLIGHT, MAX_LEN))
    groups = get_kv_cache_groups(vllm_config, specs)
    check_groups(planned, policies_of_groups(KVCacheConfig(0, [], groups)))
    assert len(groups) == 1


def test_a_plain_spec_beside_ours_would_swallow_them(vllm_config: VllmConfig) -> None:
    """Why all entries get specs of ours where one does, and why the start checks the groups."""
    planned = {"layer.0": KeepAll(), "layer.1": KeepAll(False)}
    specs = _specs(planned)
    groups = get_kv_cache_groups(vllm_config, {"layer.0": HEAD, "layer.1": specs["layer.1"]})
    with pytest.raises(ValueError, match=r"layer\.1 was to keep all-prompts-cached, and is in KV"):
        check_groups(planned, policies_of_groups(KVCacheConfig(0, [], groups)))


def test_where_everything_is_kept_and_cached_vllms_own_specs_stay() -> None:
    planned = {"layer.0": KeepAll(), "layer.1": KeepAll()}
    assert _specs(planned) == dict.fromkeys(planned, HEAD)
    assert policies_of(_specs(planned)) == planned
    assert policies_of({"draft": SlidingWindowSpec(**_shared(), sliding_window=8)}) == {
        "draft": None
    }


def _shared() -> dict[str, object]:
    return {"block_size": 32, "num_kv_heads": 1, "head_size": 64, "dtype": torch.float32}


@pytest.mark.parametrize("policy", POLICIES[1:], ids=lambda policy: policy.identity)
def test_a_spec_comes_through_whatever_vllm_does_with_it(policy: RetentionPolicy) -> None:
    spec = _specs({"layer.0": policy})["layer.0"]
    assert pickle.loads(pickle.dumps(spec)) == spec  # to other ranks and to the scheduler
    assert hash(replace(spec)) == hash(spec)
    assert spec.copy_with_new_block_size(64).policy == policy
    assert policies_of({"layer.0": replace(spec, page_size_padded=1 << 20)}) == {"layer.0": policy}


def test_sizes_are_those_of_the_longest_request(vllm_config: VllmConfig) -> None:
    policy = SpanRetention(Span(64, 128, -128, 24))
    spec = _specs({"layer.0": policy})["layer.0"]
    assert isinstance(spec, SpanSpec)
    assert spec.sliding_window == policy.span.tokens(MAX_LEN) == 2944
    most = policy.held_blocks(MAX_LEN, IN_FLIGHT, 32)
    assert spec.max_admission_blocks_per_request(IN_FLIGHT, MAX_LEN) == most == 100
    assert spec.max_admission_blocks_per_request(IN_FLIGHT - 1, MAX_LEN) == most


@pytest.mark.parametrize("chunk", [IN_FLIGHT, MAX_LEN])
def test_one_request_reads_its_prompt_while_the_others_decode(
    vllm_config: VllmConfig, chunk: int
) -> None:
    """The demo model's classes: 2 groups that keep everything, 1 and 3 that free."""
    kinds = [KeepAll(), SpanRetention(Span(64, 128, 0, 24)), SpanRetention(Span(64, 128, 0, 8))]
    planned: dict[str, RetentionPolicy] = {}
    for kind, count in zip(kinds, (30, 15, 45), strict=True):
        planned |= {f"layer.{len(planned) + number}.head0": kind for number in range(count)}
    specs = with_policies(dict.fromkeys(planned, HEAD), planned, chunk, MAX_LEN)
    groups = get_kv_cache_groups(vllm_config, dict(specs))
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=MAX_LEN),
        max_in_flight_tokens=chunk,
        max_concurrent_batches=1,
    )
    pool = KVCacheConfig(1 + 5 * 6 * 256, [], groups)
    found = concurrency(config, pool)
    assert found.dense == 5
    # Sinks, a span of 3072 tokens or of 1024, and one more: it may start inside a block.
    decoding = 2 * 256 + (2 + 97) + 3 * (2 + 33)
    reading = {IN_FLIGHT: 2 * 256 + (2 + 102) + 3 * (2 + 40), MAX_LEN: 6 * 256}[chunk]
    assert found.held == pytest.approx(1 + (5 * 6 * 256 - reading) / decoding)
    assert str(found).startswith(f"{found.held:.1f} requests of 8192 tokens at once")
    alone = concurrency(config, KVCacheConfig(1 + reading // 2, [], groups))
    assert alone.held == pytest.approx(0.5, abs=0.01)


def _routed(policy: RetentionPolicy) -> RetentionPolicy:
    return replace(policy, route=0) if isinstance(policy, AfterPrompt) else policy


def test_behind_their_prompts_requests_hold_what_answers_see(vllm_config: VllmConfig) -> None:
    """A group of full layers, and two that keep prompts whole."""
    kinds = [KeepAll(), AfterPrompt(Span(64, 512)), AfterPrompt(Span(64, 512))]
    planned = {f"layer.{number}": kinds[number % 3] for number in range(30)}
    specs = with_policies(dict.fromkeys(planned, HEAD), planned, IN_FLIGHT, MAX_LEN)
    groups = get_kv_cache_groups(vllm_config, dict(specs))
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=MAX_LEN),
        max_in_flight_tokens=IN_FLIGHT,
        max_concurrent_batches=1,
    )
    found = concurrency(config, KVCacheConfig(1 + 4 * 3 * 256, [], groups))
    assert found.dense == 4
    assert found.held == pytest.approx(1 + 3 * 3 * 256 / (256 + 2 * (2 + 17)))
    assert "routed" not in str(found)
    routed = {name: _routed(policy) for name, policy in planned.items()}
    specs = with_policies(dict.fromkeys(routed, HEAD), routed, IN_FLIGHT, MAX_LEN)
    groups = get_kv_cache_groups(vllm_config, dict(specs))
    found = concurrency(config, KVCacheConfig(1 + 4 * 3 * 256, [], groups))
    assert found.held == pytest.approx(4), "admission counts every route as full"
    assert "2 routed KV groups counted as full, more fit as routes free" in str(found)
    del planned["layer.0"], planned["layer.3"]  # 8 and 20: three groups, and padding
    specs = with_policies(dict.fromkeys(planned, HEAD), planned, IN_FLIGHT, MAX_LEN)
    groups = get_kv_cache_groups(vllm_config, dict(specs))
    assert sorted(len(group.layer_names) for group in groups) == [6, 7, 7, 8]  # as large as 8 each
    padded = concurrency(config, KVCacheConfig(1 + 4 * 4 * 256, [], groups))
    assert padded.dense == pytest.approx(4 * 4 * 8 / 28)


def test_more_tokens_in_flight_than_a_spec_was_made_for_are_refused() -> None:
    spec = _specs({"layer.0": POLICIES[2]})["layer.0"]
    assert isinstance(spec, SpanSpec)
    with pytest.raises(ValueError, match="in_flight_tokens of the KV cache spec is 256"):
        spec.max_admission_blocks_per_request(2 * IN_FLIGHT, MAX_LEN)


def test_only_plain_full_attention_is_retained() -> None:
    spec = _specs({"layer.0": POLICIES[2]})["layer.0"]
    for policy in (KeepAll(), POLICIES[2]):
        with pytest.raises(TypeError, match=r"layer\.0 has SpanSpec"):
            with_policies({"layer.0": spec}, {"layer.0": policy}, IN_FLIGHT, MAX_LEN)
