"""What the Triton implementations accept, and that they never run by accident."""

from __future__ import annotations

import importlib
import os
from dataclasses import replace
from typing import Any

import pytest
import torch

from attn_backends.batch import BlockSelection, PagedBatch
from attn_backends.ops.anchor_decode.api import implementations as anchor_decode
from attn_backends.ops.block_topk.api import implementations as block_topk
from attn_backends.ops.cache_write.api import implementations as cache_write
from attn_backends.ops.dispatch import OpContext, OpImpl
from attn_backends.ops.paged_attention.api import implementations as paged_attention
from attn_backends.ops.sparse_decode.api import implementations as sparse_decode
from attn_backends.ops.triton_support import (
    MAX_PROGRAMS,
    Tile,
    check_heads_are_contiguous,
    padded_head,
    programs_per_head,
    tile_of,
)
from kvcache.layout import KVOrder, PagedKVLayout, kv_views

TRITON = [
    pytest.param(impl, id=impl.op)
    for implementations in (cache_write, paged_attention, sparse_decode, anchor_decode, block_topk)
    for impl in implementations()
    if impl.name == "triton"
]
LAYOUT = PagedKVLayout(4, 32, 2, 64, torch.bfloat16, KVOrder.FUSED)
CONTEXT = OpContext(LAYOUT, 4, "cpu", True)
ON_GPU = replace(CONTEXT, device_type="cuda")


def test_every_op_has_a_triton_implementation() -> None:
    assert len(TRITON) == 5


@pytest.mark.parametrize("impl", TRITON)
def test_serves_the_cpu_in_the_interpreter_only(
    impl: OpImpl, monkeypatch: pytest.MonkeyPatch
) -> None:
    # First as this process runs Triton, which keeps what it makes of a kernel.
    assert impl.unsupported_reason(ON_GPU) is None
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert impl.unsupported_reason(CONTEXT) is None
    monkeypatch.delenv("TRITON_INTERPRET")
    reason = impl.unsupported_reason(CONTEXT)
    assert reason is not None
    assert "TRITON_INTERPRET" in reason
    assert impl.unsupported_reason(ON_GPU) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [("head_size", 320), ("dtype", torch.float8_e4m3fn)],
    ids=["head_size", "dtype"],
)
@pytest.mark.parametrize(
    "impl", [impl for impl in TRITON if impl.id not in ("cache_write", "block_topk")]
)
def test_refuses_untested_sizes_by_name(impl: OpImpl, field: str, value: Any) -> None:
    layout = replace(LAYOUT, **{field: value})
    reason = impl.unsupported_reason(replace(ON_GPU, layout=layout))
    assert reason is not None
    assert field in reason


@pytest.mark.parametrize(
    "name",
    [*(f"{impl.id}.impl.triton" for impl in TRITON), "triton_support"],
)
def test_kernels_hold_no_host_synchronisation(name: str) -> None:
    module = importlib.import_module(f"attn_backends.ops.{name}")
    assert module.__file__ is not None
    with open(module.__file__) as file:
        source = file.read()
    for call in (".item(", ".tolist(", ".cpu(", "synchronize("):
        assert call not in source


@pytest.mark.parametrize("shared_kib", [99, 163, 227])
@pytest.mark.parametrize("head_size", [64, 80, 128, 256])
def test_tiles_and_their_pipeline_fit_into_the_cards_shared_memory(
    head_size: int, shared_kib: int
) -> None:
    shared_bytes = shared_kib * 1024
    for dtype in (torch.bfloat16, torch.float32):
        for tensors in (1, 2):
            tile = tile_of(head_size, dtype, tensors, shared_bytes)
            tile_bytes = tensors * tile.tokens * padded_head(head_size) * dtype.itemsize
            assert tile_bytes * tile.num_stages <= shared_bytes
    # On an H100 or H200 heads of 128 get what gpu-h200-fa7282f's session found good in a sketch.
    if (head_size, shared_kib) == (128, 227):
        assert tile_of(128, torch.bfloat16, 2, shared_bytes) == Tile(128, 3)


def test_programs_follow_from_shapes_and_stay_few() -> None:
    assert programs_per_head(2, 8) == 2  # a narrow selection: two useful splits
    assert programs_per_head(128, 8) == 128  # one long row of eight heads
    assert programs_per_head(128, 256 * 8) * 256 * 8 <= MAX_PROGRAMS
    assert programs_per_head(128, 1 << 20) == 1


def test_queries_whose_heads_lie_apart_are_refused_by_name() -> None:
    query = torch.empty(3, 8, 64)
    check_heads_are_contiguous(query[:, 2:6], None)  # part of queries, keys and values
    with pytest.raises(ValueError, match=r"query has strides .* contiguous per token"):
        check_heads_are_contiguous(query[:, ::2], None)
    with pytest.raises(ValueError, match="out has strides"):
        check_heads_are_contiguous(query, query[..., :32])


# As large as a GPU's pool: element offsets beyond 2^31. Memory that is not touched costs none.
@pytest.mark.slow
@pytest.mark.skipif(os.environ["TRITON_INTERPRET"] != "1", reason="would fill a GPU's memory")
def test_offsets_into_the_pool_do_not_overflow() -> None:
    block_size, head_size, num_rows = 16, 64, 2
    tile = block_size * 2 * head_size
    num_blocks = (1 << 31) // tile + 8
    pool = torch.empty(num_blocks, 1, block_size, 2 * head_size, dtype=torch.bfloat16)
    views = kv_views(pool, KVOrder.FUSED)
    keys, values = torch.randn(2, num_rows * block_size, 1, head_size).bfloat16()
    table = torch.tensor([[num_blocks - 1], [num_blocks - 3]], dtype=torch.int32)
    slots = (table.long() * block_size + torch.arange(block_size)).flatten()
    query = torch.randn(num_rows, 2, head_size).bfloat16()
    lens = torch.full((num_rows,), block_size, dtype=torch.int32)
    starts = torch.arange(num_rows + 1, dtype=torch.int32)
    batch = PagedBatch(starts, lens, table, num_rows, num_rows, 1, block_size)
    selection = BlockSelection(
        torch.zeros(num_rows, 1, 1, dtype=torch.int32), torch.ones(num_rows, 1, dtype=torch.int32)
    )
    run = {impl.id: impl.values[0].run for impl in TRITON}
    run["cache_write"](keys, values, *views, slots)
    weights = (query.float() @ keys.float().view(num_rows, block_size, -1).mT / 8).softmax(-1)
    expected = weights @ values.float().view(num_rows, block_size, -1)
    for op, middle in (
        ("sparse_decode", (batch, selection, None, 1 / 8)),
        ("anchor_decode", (batch, 1 / 8)),
        ("paged_attention", (batch, None, 1 / 8)),
    ):
        out = torch.empty_like(query)
        tail = (out, None) if op == "anchor_decode" else (out,)
        run[op](query, *views, *middle, *tail)
        torch.testing.assert_close(out.float(), expected, atol=0.02, rtol=0.02)
