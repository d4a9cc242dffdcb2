"""The worker plans retention per entry, and starts with vLLM's groups as planned or not at all."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.core.kv_cache_utils import get_kv_cache_groups
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.worker.gpu.warmup import run_mixed_prefill_decode_warmup, warmup_kernels

from attn_backends.adapter import worker as worker_module
from attn_backends.adapter.entries import HeadEntry
from attn_backends.adapter.impl import ExtAttentionImpl
from attn_backends.adapter.requests import BOOK
from attn_backends.adapter.worker import ReadyBeforeServing, RetainingWorker
from attn_backends.config import ConfigError
from kvcache.adapter.managers import register
from tests.adapter.layers import attention_layer, layer_name
from tests.moa_profile import write_profile

NAMES = [layer_name(index) for index in range(4)]
FULL = FullAttentionSpec(block_size=32, num_kv_heads=2, head_size=64, dtype=torch.float32)


class _Stock:
    """What vLLM's worker does about the KV cache."""

    vllm_config: VllmConfig
    given: Any = None

    def get_kv_cache_spec(self) -> dict[str, FullAttentionSpec]:
        kind: Any = AttentionLayerBase
        layers: dict[str, Any] = get_layers_from_vllm_config(self.vllm_config, kind)
        self.shared = {
            name: target
            for name, layer in layers.items()
            if (target := getattr(layer, "kv_sharing_target_layer_name", None))
        }
        return {
            name: layer.get_kv_cache_spec(self.vllm_config)
            for name, layer in layers.items()
            if name not in self.shared
        }

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
            parallel_config=SimpleNamespace(world_size=1),
            cache_config=SimpleNamespace(block_size=32),
            scheduler_config=SimpleNamespace(max_num_seqs=4, max_num_batched_tokens=256),
            max_in_flight_tokens=256,
            max_concurrent_batches=1,
            compilation_config=SimpleNamespace(
                static_forward_context={
                    name: attention_layer(index, ExtAttentionImpl)
                    for index, name in enumerate(NAMES)
                }
            ),
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


@pytest.mark.parametrize(
    ("window_tokens", "level", "words"),
    [
        (256, "INFO", "SINK_WINDOW: 5.1 requests of 4096 tokens at once in this pool, dense 0.5;"),
        (4000, "WARNING", "SINK_WINDOW frees next to nothing: 0.5 requests of 4096 tokens"),
    ],
)
def test_the_log_says_what_is_freed(
    window_tokens: int, level: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    worker = _Worker("SINK_WINDOW", {"window_tokens": window_tokens})
    config = _grouped(dict(worker.get_kv_cache_spec()))
    config.num_blocks = 65
    with caplog.at_level("INFO", "vllm.vllm_ext"):
        worker.initialize_from_config(config)
    said = {record.getMessage(): record.levelname for record in caplog.records}
    (line,) = (line for line in said if line.startswith(words))
    assert said[line] == level
    assert "up to 256 prompt tokens in flight" in line


def test_other_groups_are_refused_before_anything_is_allocated() -> None:
    worker = _Worker("SINK_WINDOW", {})
    worker.get_kv_cache_spec()
    with pytest.raises(ConfigError, match=r"SINK_WINDOW: entry model\.layers\.0.* in KV group 0"):
        worker.initialize_from_config(_grouped(dict.fromkeys(NAMES, FULL)))
    assert worker.given is None


def test_heads_that_keep_different_blocks_are_entries_of_their_own(tmp_path: Path) -> None:
    profile = {
        "schema_version": 2,
        "fingerprint": "0" * 64,
        "model": "tiny",
        "num_layers": len(NAMES),
        "num_kv_heads": 2,
        "methods": {"SINK_WINDOW": {"full_heads": {"1": [1]}, "full_layers": [2]}},
        "calibration": {},
    }
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(profile))
    worker = _Worker("SINK_WINDOW", {"profile": str(path)})
    specs: dict[str, Any] = dict(worker.get_kv_cache_spec())
    # A page is as large for all: where one layer is split, all are.
    assert set(specs) == {f"{name}.head{head}" for name in NAMES for head in (0, 1)}
    assert worker.shared == {name: f"{name}.head0" for name in NAMES}
    assert {spec.num_kv_heads for spec in specs.values()} == {1}
    full = {f"{NAMES[1]}.head1", f"{NAMES[2]}.head0", f"{NAMES[2]}.head1"}
    assert {name for name, spec in specs.items() if spec.policy.identity == "all"} == full
    others = {spec.policy.identity for name, spec in specs.items() if name not in full}
    assert others == {"sink64-window1024"}
    layers: dict[str, Any] = worker.vllm_config.compilation_config.static_forward_context
    assert all(layers[name].kv_sharing_target_layer_name is None for name in NAMES)
    assert [entry.heads for entry in layers[NAMES[3]].impl._entries] == [(0,), (1,)]
    assert worker.get_kv_cache_spec() == specs, "asked again, it makes the entries again"
    worker.initialize_from_config(_grouped(specs))


def test_dummy_runs_write_nothing_where_heads_have_caches_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM warms up, and idles beside other data-parallel engines, with slots but no metadata."""
    layer = attention_layer(0, ExtAttentionImpl)
    layer.impl.split((HeadEntry(layer, (0,)), HeadEntry(layer, (1,))))
    no_metadata = SimpleNamespace(attn_metadata=None)
    monkeypatch.setattr("attn_backends.adapter.impl.get_forward_context", lambda: no_metadata)
    keys = torch.ones(4, 2, 64)
    cache = torch.zeros(3, 1, 32, 128)
    slots = torch.full((4,), -1)
    layer.impl.do_kv_cache_update(layer, keys, keys, cache, slots)
    assert not cache.any()


def _runner_v2(num_reqs: int) -> Any:
    """What vLLM's warm-up asks of runner V2."""
    ignore = lambda *_: None  # noqa: E731
    return SimpleNamespace(
        adaptive_verification=None,
        rejection_sampler=None,
        vllm_config=SimpleNamespace(is_mm_encoder_only=False, num_lookahead_tokens=0),
        num_speculative_steps=0,
        decode_query_len=1,
        is_pooling_model=False,
        is_encoder_decoder=False,
        is_last_pp_rank=True,
        model_state=None,
        max_model_len=4096,
        max_num_reqs=num_reqs,
        kv_cache_config=_grouped(dict.fromkeys(NAMES, FULL)),
        scheduler_config=SimpleNamespace(max_num_seqs=num_reqs, max_num_batched_tokens=2048),
        model_config=SimpleNamespace(get_vocab_size=lambda: 64),
        kv_block_zeroer=None,
        kv_connector=SimpleNamespace(set_disabled=ignore),
    )


def test_vllms_own_warm_up_is_nobodys_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    rows: list[tuple[int, int]] = []  # that vLLM scheduled, that are requests to us

    class Stock:
        def execute_model(self, step: SchedulerOutput) -> None:
            rows.append((len(step.num_scheduled_tokens), BOOK.num_rows))

        def compile_or_warm_up_model(self) -> str:
            runner, ours = _runner_v2(num_reqs=4), self.execute_model
            warmup_kernels(runner, ours, lambda grammar: None)
            assert run_mixed_prefill_decode_warmup(runner, ours, lambda grammar: None, 64)
            return "warm"

    class Worker(RetainingWorker, Stock):
        """As on GPUs."""

    worker = Worker()
    assert worker.compile_or_warm_up_model() == "warm"
    assert (4, 0) in rows, "no decode step was run"
    assert {num_requests for _, num_requests in rows} == {0}
    step = SchedulerOutput.make_empty()
    step.num_scheduled_tokens = {"a": 1, "b": 1}
    worker.execute_model(step)
    assert rows[-1] == (2, 2)
    worker.execute_model(SchedulerOutput.make_empty())
    assert (rows[-1], BOOK.num_rows) == ((0, 0), 0)


def _live_tensors() -> dict[int, torch.Tensor]:
    gc.collect()
    return {id(one): one for one in gc.get_objects() if type(one) is torch.Tensor}


@pytest.mark.parametrize(
    ("method", "expected_bytes"),
    [
        # A selection's blocks, and the blocks' masses: 4 rows, 2 KV heads, 4,096 / 32 blocks.
        ("TIDAL_DECODE", 2 * (4 * 2 * 128 * 4)),
        # Of 8 heads in 2 classes: selections of two kinds of layers, tiles, tables of 2 groups.
        ("MOA", (2 + 1) * (4 * 2 * 128 * 4) + 4 * 2 * 128 * 4),
    ],
)
def test_buffers_are_there_while_vllm_measures(
    method: str, expected_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = write_profile(tmp_path / "profile.json", len(NAMES), 2, [[0, 64], [0, 63]])
    before = _live_tensors()

    class Stock(_Stock):
        def determine_available_memory(self) -> int:
            new = [one for key, one in _live_tensors().items() if key not in before]
            return (1 << 30) - sum(one.untyped_storage().nbytes() for one in new)

    class Worker(ReadyBeforeServing, _Worker, Stock):
        device = torch.device("cpu")

    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    unbound: list[Any] = []
    monkeypatch.setattr(worker_module, "unbind_caches", unbound.append)
    worker = Worker(method, {"profile": profile} if method == "MOA" else {})
    worker.get_kv_cache_spec()
    measured_bytes = (1 << 30) - worker.determine_available_memory()
    assert measured_bytes >= expected_bytes
    assert unbound == [worker.vllm_config]
    after = [one for key, one in _live_tensors().items() if key not in before]
    assert sum(one.untyped_storage().nbytes() for one in after) < measured_bytes / 2
    for stock_backend in ("FLASH_ATTN", "TRITON_ATTN"):
        worker = Worker(stock_backend, None)
        worker.get_kv_cache_spec()
        engine = worker.vllm_config, worker._specs, worker.device
        assert worker_module.selectors_of(*engine) == []
        assert worker_module.head_tables_of(*engine) is None


def test_kernels_are_warm_before_vllm_captures_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Stock(_Stock):
        model_runner = None

        def compile_or_warm_up_model(self) -> None:
            done.append("captured")

    class Worker(ReadyBeforeServing, _Worker, Stock):
        device = torch.device("cpu")

    monkeypatch.setattr(worker_module, "warm_up_builders", lambda *_: done.append("warm"))
    Worker("TIDAL_DECODE", {}).compile_or_warm_up_model()
    assert done == ["warm", "captured"]
