"""As ``test_flash_attention.py``, with vLLM's real kernels: needs a GPU and its CUDA wheel."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")
from vllm.platforms import current_platform

from attn_backends.adapter.engine_ops import cuda
from attn_backends.ops.cache_write.api import implementations as cache_writers
from attn_backends.ops.dispatch import OpContext
from kvcache.layout import KVOrder, kv_views
from kvcache.spans import Span
from tests.adapter.test_flash_attention import QUERY_LENS, SEQ_LENS
from tests.ops.builders import Problem, dense_attention, make_problem, make_rule
from tests.tolerances import assert_bitwise_equal, assert_no_worse_than_eager

pytestmark = pytest.mark.skipif(not current_platform.is_cuda(), reason="needs a GPU")


def _problem(**changes: Any) -> Problem:
    lengths = {"seq_lens": SEQ_LENS, "query_lens": QUERY_LENS, "dtype": torch.bfloat16}
    return make_problem(**(lengths | changes), device="cuda")


def _flash(problem: Problem, with_rule: bool) -> cuda.FlashAttention:
    flash = cuda.FlashAttention()
    context = OpContext(problem.layout, problem.query.shape[1], "cuda", with_rule, with_rule)
    if reason := flash.unsupported_reason(context):
        pytest.skip(reason)
    return flash


@pytest.mark.parametrize("span", [None, Span(0, 12), Span(5, 12), Span(1, 1), Span(16, 32)])
@pytest.mark.parametrize(
    "shape",
    [
        {"block_size": 16, "head_size": 128, "num_q_heads": 32, "num_kv_heads": 8},
        {"block_size": 64, "head_size": 128, "num_q_heads": 4, "num_kv_heads": 1},
        {"block_size": 16, "head_size": 64, "num_q_heads": 9, "num_kv_heads": 3},
        {"block_size": 48, "head_size": 80, "dtype": torch.float16},
        {"block_size": 128, "head_size": 256, "seq_lens": (700, 129), "query_lens": (300, 129)},
        {"seq_lens": (900, 3, 1), "query_lens": (1, 1, 1), "block_size": 16},
    ],
)
def test_prefill(span: Span | None, shape: dict[str, Any]) -> None:
    problem = _problem(**shape)
    rule = None if span is None else make_rule(problem, span)
    out = problem.out.clone()
    caches = problem.key_cache, problem.value_cache
    flash = _flash(problem, with_rule=rule is not None)
    flash.attend(problem.query, *caches, problem.batch, rule, problem.scale, out)
    dtype = problem.layout.dtype
    exact = dense_attention(problem, rule, torch.float64)
    eager = dense_attention(problem, rule, dtype)
    assert_no_worse_than_eager(out.cpu(), exact, eager, dtype)


def test_decode_rows_in_a_graph_that_was_captured_for_other_lengths() -> None:
    lengths = (900, 1, 333, 64)
    problem = _problem(seq_lens=lengths, query_lens=(1,) * 4, block_size=16, head_size=128)
    seq_lens = torch.ones_like(problem.batch.seq_lens)
    batch = replace(problem.batch, seq_lens=seq_lens, max_seq_len=4096)
    out, flash = problem.out.clone(), _flash(problem, with_rule=False)
    caches = problem.key_cache, problem.value_cache

    def decode() -> None:
        flash.decode(problem.query, *caches, batch, problem.scale, out)

    decode()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode()
    seq_lens.copy_(problem.batch.seq_lens)
    graph.replay()
    exact = dense_attention(problem, None, torch.float64)
    eager = dense_attention(problem, None, torch.bfloat16)
    assert_no_worse_than_eager(out.cpu(), exact, eager, torch.bfloat16)


@pytest.mark.parametrize("num_kv_heads", [1, 8])
@pytest.mark.parametrize("heads_outside", [True, False], ids=["LBHNC", "LBNHC"])
def test_cache_writer(num_kv_heads: int, heads_outside: bool) -> None:
    reference = {impl.name: impl.run for impl in cache_writers()}["reference"]
    qkv = torch.randn(70, 3 * num_kv_heads, 80, device="cuda").to(torch.bfloat16)
    key, value = qkv[:, num_kv_heads : 2 * num_kv_heads], qkv[:, 2 * num_kv_heads :]
    slots = torch.randperm(128, device="cuda")[:70]
    slots[::9] = -1
    shape = (8, num_kv_heads, 16, 160) if heads_outside else (8, 16, num_kv_heads, 160)
    written = []
    for write in (reference, cuda.write):
        memory = torch.full(shape, torch.nan, dtype=torch.bfloat16, device="cuda")
        cache = memory if heads_outside else memory.transpose(1, 2)
        write(key, value, *kv_views(cache, KVOrder.FUSED), slots)
        written.append(memory)
    assert_bitwise_equal(written[1], written[0])
