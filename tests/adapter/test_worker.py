"""The worker plans retention per entry, and starts with vLLM's groups as planned or not at all."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.config import VllmConfig
from vllm.v1.core.kv_cache_utils import get_kv_cache_groups
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from attn_backends.adapter.worker import RetainingWorker
from attn_backends.config import ConfigError
from kvcache.adapter.managers import register

NAMES = [f"model.layers.{layer}.self_attn.attn" for layer in range(4)]
FULL = FullAttentionSpec(block_size=32, num_kv_heads=2, head_size=64, dtype=torch.float32)


class _Stock:
    """What vLLM's worker does about the KV cache."""

    given: Any = None

    def get_kv_cache_spec(self) -> dict[str, FullAttentionSpec]:
        return dict.fromkeys(NAMES, FULL)

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        self.given = kv_cache_config


class _Worker(RetainingWorker, _Stock):
    def __init__(self, backend: str, settings: dict[str, Any] | None) -> None:
        model: Any = SimpleNamespace(
            get_total_num_hidden_layers=lambda: len(NAMES),
            get_num_kv_heads=lambda parallel: 2,
            get_num_attention_heads=lambda parallel: 4,
            get_head_size=lambda: 64,
            max_model_len=4096,
            model="tiny",
        )
        config: Any = SimpleNamespace(
            additional_config=None if settings is None else {"vllm_ext": settings},
            attention_config=SimpleNamespace(backend=SimpleNamespace(name=backend)),
            model_config=model,
            parallel_config=None,
            cache_config=SimpleNamespace(block_size=32),
            scheduler_config=SimpleNamespace(max_num_seqs=4),
            max_in_flight_tokens=256,
        )
        self.vllm_config = config


def _grouped(specs: dict[str, Any]) -> KVCacheConfig:
    KVCacheSpecRegistry._ensure_registered()
    register()
    config = VllmConfig()
    config.cache_config.kv_cache_layout = "LBHNC"
    return KVCacheConfig(10, [], get_kv_cache_groups(config, specs))


@pytest.mark.parametrize(
    ("backend", "settings", "policies"),
    [
        ("SINK_WINDOW", {}, {"sink64-window1024"}),
        ("SINK_WINDOW", {"retention": "keep_all"}, None),
        ("TIDAL_DECODE", {}, {"all-prompts-cached"}),
        ("SPARSE_FULL", {}, None),
        ("CPU_ATTN", None, None),
    ],
)
def test_groups_as_planned_start(
    backend: str, settings: dict[str, Any] | None, policies: set[str] | None
) -> None:
    worker = _Worker(backend, settings)
    specs = worker.get_kv_cache_spec()
    if policies is None:
        assert specs == dict.fromkeys(NAMES, FULL)
    else:
        assert {spec.policy.identity for spec in specs.values()} == policies  # type: ignore[attr-defined]
    config = _grouped(dict(specs))
    worker.initialize_from_config(config)
    assert worker.given is config


def test_other_groups_are_refused_before_anything_is_allocated() -> None:
    worker = _Worker("SINK_WINDOW", {})
    worker.get_kv_cache_spec()
    with pytest.raises(ConfigError, match=r"SINK_WINDOW: entry model\.layers\.0.* in KV group 0"):
        worker.initialize_from_config(_grouped(dict.fromkeys(NAMES, FULL)))
    assert worker.given is None
