"""A decode graph as vLLM's runner V2 captures and replays it, up to the ops: no GPU is needed.

The metadata of the capture, of padded batches and of dummy runs is made by vLLM's own functions,
with our builder behind them. What a layer then launches must be the same, and what is counted must
be what was served.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from vllm.config.compilation import CUDAGraphMode
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.worker.gpu.cudagraph_utils import prepare_inputs_to_capture
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.utils import AttentionGroup

from attn_backends.adapter import backend as backends
from attn_backends.adapter import impl, warming
from attn_backends.adapter.impl import ExtAttentionImpl
from attn_backends.adapter.requests import BOOK
from attn_backends.batch import RowOptions
from attn_backends.methods import REGISTRY, load_method
from attn_backends.ops.dispatch import OpImpl
from attn_backends.ops.resolution import Ops
from kvcache.spans import EVERYTHING_TOKENS
from tests.adapter.layers import attention_layer
from tests.flux_profile import write_profile, write_routed_profile

LAYERS, KV_HEADS, HEADS, HEAD, BLOCK, BLOCKS = 4, 2, 4, 64, 32, 12
MAX_MODEL_LEN, MAX_REQS, MAX_TOKENS = 2048, 16, 256
CPU = torch.device("cpu")


def _config(method: str, layers: dict[str, Any], settings: dict[str, Any]) -> Any:
    model = SimpleNamespace(
        get_total_num_hidden_layers=lambda: LAYERS,
        get_num_kv_heads=lambda parallel: KV_HEADS,
        get_num_attention_heads=lambda parallel: HEADS,
        get_head_size=lambda: HEAD,
        max_model_len=MAX_MODEL_LEN,
        model="tiny",
    )
    return SimpleNamespace(
        additional_config={"vllm_ext": {"kernel": "reference"} | settings},
        attention_config=SimpleNamespace(backend=SimpleNamespace(name=method)),
        model_config=model,
        parallel_config=SimpleNamespace(world_size=1, rank=0, data_parallel_index=0),
        cache_config=SimpleNamespace(block_size=BLOCK),
        scheduler_config=SimpleNamespace(max_num_seqs=MAX_REQS, max_num_batched_tokens=MAX_TOKENS),
        compilation_config=SimpleNamespace(static_forward_context=layers),
    )


def _told(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.data_ptr(), value.shape, value.stride(), value.dtype
    if is_dataclass(value):
        return [(one.name, _told(getattr(value, one.name))) for one in fields(value)]
    return value


class _Counters:
    def __init__(self) -> None:
        self.rows: Counter[tuple[str, str]] = Counter()
        self.verified = 0

    def add(self, rows: Counter[tuple[str, str]]) -> None:
        self.rows += rows

    def add_verified(self, num_rows: int) -> None:
        self.verified += num_rows

    def show_recall(self, watch: Any) -> None:
        """Not looked at."""


class _Tables:
    """vLLM's block tables, without its UVA buffers."""

    cp_size = 1

    def __init__(self) -> None:
        self.input_block_tables = [torch.zeros(MAX_REQS, BLOCKS, dtype=torch.int32)]
        self.slots = torch.full((1, MAX_TOKENS), -1)

    def get_dummy_block_tables(self, num_reqs: int) -> tuple[torch.Tensor, ...]:
        return tuple(table[:num_reqs].zero_() for table in self.input_block_tables)

    def get_dummy_slot_mappings(self, num_tokens: int) -> torch.Tensor:
        return self.slots[:, :num_tokens]


class _Runner:
    """Runner V2 around our builder, as far as metadata goes."""

    def __init__(
        self, method: str, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
    ) -> None:
        monkeypatch.setattr(BOOK, "_dense_until", None)
        monkeypatch.setattr(impl, "_configured_kernel", lambda: "reference")
        self.layers: dict[str, Any] = {}
        backend: Any = getattr(backends, method)
        for index in range(LAYERS):
            layer = attention_layer(index, ExtAttentionImpl, KV_HEADS)
            layer.impl = ExtAttentionImpl(HEADS, HEAD, HEAD**-0.5, KV_HEADS)
            layer.kv_cache = torch.randn(BLOCKS, KV_HEADS, BLOCK, 2 * HEAD)
            layer.get_attn_backend = lambda: backend
            self.layers[layer.layer_name] = layer
        self.vllm_config = _config(method, self.layers, settings)
        spec = FullAttentionSpec(
            block_size=BLOCK, num_kv_heads=KV_HEADS, head_size=HEAD, dtype=torch.float32
        )
        names = list(self.layers)
        self.group = AttentionGroup(backend, names, spec, 0)
        self.group.create_metadata_builders(self.vllm_config, CPU)
        self.builder: Any = self.group.get_metadata_builder(0)
        self.builder.device = SimpleNamespace(type="cuda")  # rows are split as on GPUs
        self.counters = self.builder._planner._counters = _Counters()
        self.calls: list[Any] = []
        self.builder._ops = tuple(
            Ops(*(self._recorded(getattr(ops, one.name)) for one in fields(ops)))
            for ops in self.builder._ops
        )
        self.attn_groups, self.req_states = [[self.group]], SimpleNamespace()
        self.kv_cache_config = KVCacheConfig(BLOCKS, [], [KVCacheGroupSpec(names, spec)])
        self.block_tables: Any = _Tables()
        self.buffers = InputBuffers(MAX_REQS, MAX_TOKENS, CPU)
        self.state: Any = DefaultModelState.__new__(DefaultModelState)
        self.state.model_config, self.state.supports_mm_inputs = (
            self.vllm_config.model_config,
            False,
        )
        self.query = torch.randn(MAX_TOKENS, HEADS, HEAD)
        self.out = torch.empty_like(self.query)

    def _recorded(self, op: OpImpl) -> OpImpl:
        def run(*arguments: Any) -> None:
            self.calls.append((op.op, [_told(one) for one in arguments]))
            op.run(*arguments)

        return OpImpl(op.op, op.name, run, op.unsupported_reason)

    def _run(self, metadata: Any, num_tokens: int) -> list[Any]:
        self.calls = []
        query, out = self.query[:num_tokens], self.out[:num_tokens]
        for name, layer in self.layers.items():
            layer.impl.forward(layer, query, query, query, layer.kv_cache, metadata[name], out)
        return self.calls

    def capture(self, num_reqs: int, query_len: int = 1) -> list[Any]:
        """What goes into a decode graph."""
        num_tokens = num_reqs * query_len
        metadata, _ = prepare_inputs_to_capture(
            num_reqs,
            num_tokens,
            self.state,
            self.buffers,
            self.block_tables,
            self.attn_groups,
            self.kv_cache_config,
            full_cudagraph=True,
            max_query_len=query_len,
        )
        return self._run(metadata, num_tokens)

    def batch(
        self, seq_lens: list[int], prefilling: list[bool], padded: int, query_len: int = 1
    ) -> InputBatch:
        """As ``prepare_inputs`` makes it of rows of as many tokens each."""
        rows = len(seq_lens)
        dummy = InputBatch.make_dummy(
            padded, padded * query_len, self.buffers, max_query_len=query_len
        )
        rest = [0] * (padded - rows)
        self.buffers.seq_lens[:padded] = torch.tensor(seq_lens + rest)
        starts = np.minimum(np.arange(padded + 1, dtype=np.int32), rows) * query_len
        self.buffers.query_start_loc[: padded + 1] = torch.from_numpy(starts)
        return replace(
            dummy,
            num_reqs=rows,
            num_tokens=rows * query_len,
            idx_mapping_np=np.arange(rows),
            num_scheduled_tokens=np.full(rows, query_len, dtype=np.int32),
            query_start_loc_np=starts,
            seq_lens_cpu_upper_bound=torch.tensor(seq_lens + rest, dtype=torch.int32),
            is_prefilling_np=np.array(prefilling),
        )

    def replay(
        self, seq_lens: list[int], prefilling: list[bool], padded: int, query_len: int = 1
    ) -> list[Any]:
        """What the same graph would have to do for these rows."""
        batch = self.batch(seq_lens, prefilling, padded, query_len)
        metadata = self.state.prepare_attn(
            batch,
            CUDAGraphMode.FULL,
            tuple(table[:padded] for table in self.block_tables.input_block_tables),
            self.block_tables.slots[:, : padded * query_len],
            self.attn_groups,
            self.kv_cache_config,
        )
        return self._run(metadata, padded * query_len)


def _flux_profile(path: Path, is_routed: bool) -> str:
    """Layer 0 is full, or all but the last are routed one by one, each request another way."""
    if not is_routed:
        return write_profile(path, LAYERS, KV_HEADS, [0])
    groups = [[layer] for layer in range(LAYERS - 1)]
    router = {"weights": torch.ones(len(groups), LAYERS, KV_HEADS)}
    router |= {"log_tokens": torch.zeros(len(groups)), "bias": torch.zeros(len(groups))}
    return write_routed_profile(path, [], groups, router)


# MOA keeps heads apart: tests/e2e/test_recorded_graphs.py.
@pytest.mark.parametrize("method", sorted({*REGISTRY} - {"MOA"} | {"FLUX routed"}))
def test_what_is_captured_is_right_for_every_padded_batch(
    method: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {}
    method, *routed = method.split()
    if load_method(method).needs_profile:
        assert method == "FLUX", "write a profile for it here"
        settings = {"profile": _flux_profile(tmp_path / "profile.json", bool(routed))}
    runner = _Runner(method, monkeypatch, settings)
    support = type(runner.builder).get_cudagraph_support(runner.vllm_config, None)
    assert support is AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    captured = runner.capture(8)
    assert len(captured) >= LAYERS
    assert not runner.counters.rows, "nobody's rows were counted"
    monkeypatch.setattr(BOOK, "row_ids", lambda places: [f"r{place}" for place in places])
    monkeypatch.setattr(BOOK, "_by_id", {"r1": RowOptions(budget_tokens=128)})
    ends = {f"r{row}": 100 * row for row in range(7)} | {"r0": 371, "r7": EVERYTHING_TOKENS}
    monkeypatch.setattr(BOOK, "_dense_until", ends)
    for seq_lens, prefilling in (
        ([380, 300, 200], [False, False, False]),
        ([380] * 8, [False] * 8),
        ([1], [False]),
        ([370, 380, 5], [True, False, False]),  # a prompt's last token
    ):
        monkeypatch.setattr(BOOK, "num_rows", len(seq_lens))
        runner.counters.rows.clear()
        assert runner.replay(seq_lens, prefilling, 8) == captured
        assert sum(runner.counters.rows.values()) == prefilling.count(False)


def test_what_verifies_drafts_is_captured_for_every_padded_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three drafts of each row and the token before them, in one dense pass."""
    runner = _Runner("TIDAL_DECODE", monkeypatch, {"lossless_tokens": 3})
    support = type(runner.builder).get_cudagraph_support(runner.vllm_config, None)
    assert support is AttentionCGSupport.UNIFORM_BATCH
    captured = runner.capture(8, query_len=4)
    assert {op for op, _ in captured} == {"paged_attention"}
    for seq_lens in ([380, 300, 200], [380] * 8, [4]):
        monkeypatch.setattr(BOOK, "num_rows", len(seq_lens))
        replayed = runner.replay(seq_lens, [False] * len(seq_lens), 8, query_len=4)
        bound = ("max_seq_len", max(seq_lens))  # of the batch; the graph's is of every batch
        assert str(bound) in str(replayed)
        expected = str(captured).replace(str(("max_seq_len", MAX_MODEL_LEN)), str(bound))
        assert str(replayed) == expected
    assert not runner.counters.rows, "what verifies answers no sparse row"
    assert runner.counters.verified == 3 + 8 + 1


def test_the_warm_up_runs_the_layers_on_their_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = _Runner("TIDAL_DECODE", monkeypatch, {})
    caches = {name: layer.kv_cache.clone() for name, layer in runner.layers.items()}
    warming.warm_up_builders(runner, runner.vllm_config)
    used = {op for op, _ in runner.calls}
    assert used == {
        *("anchor_decode", "block_topk", "dense_decode"),
        *("sparse_decode", "paged_attention"),
    }
    for name, layer in runner.layers.items():
        assert torch.equal(layer.kv_cache, caches[name])
        assert layer.impl._bound[0] is layer.kv_cache
    assert not runner.counters.rows
    warming.unbind_caches(runner.vllm_config)
    assert all(layer.impl._bound is None for layer in runner.layers.values())
