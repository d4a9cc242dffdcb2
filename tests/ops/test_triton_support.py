"""What the Triton implementations accept, and that they never run by accident."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch

from attn_backends.ops.anchor_decode.api import implementations as anchor_decode
from attn_backends.ops.block_topk.api import implementations as block_topk
from attn_backends.ops.cache_write.api import implementations as cache_write
from attn_backends.ops.dispatch import OpContext, OpImpl
from attn_backends.ops.paged_attention.api import implementations as paged_attention
from attn_backends.ops.sparse_decode.api import implementations as sparse_decode
from kvcache.layout import KVOrder, PagedKVLayout

TRITON = [
    pytest.param(impl, id=impl.op)
    for implementations in (cache_write, paged_attention, sparse_decode, anchor_decode, block_topk)
    for impl in implementations()
    if impl.name == "triton"
]
LAYOUT = PagedKVLayout(4, 32, 2, 64, torch.bfloat16, KVOrder.FUSED)
CONTEXT = OpContext(LAYOUT, 4, "cpu", True)


def test_every_op_has_a_triton_implementation() -> None:
    assert len(TRITON) == 5


@pytest.mark.parametrize("impl", TRITON)
def test_serves_the_cpu_in_the_interpreter_only(
    impl: OpImpl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert impl.unsupported_reason(CONTEXT) is None
    monkeypatch.delenv("TRITON_INTERPRET")
    reason = impl.unsupported_reason(CONTEXT)
    assert reason is not None
    assert "TRITON_INTERPRET" in reason
    assert impl.unsupported_reason(replace(CONTEXT, device_type="cuda")) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [("head_size", 256), ("block_size", 256), ("dtype", torch.float8_e4m3fn)],
    ids=["head_size", "block_size", "dtype"],
)
@pytest.mark.parametrize(
    "impl", [impl for impl in TRITON if impl.id not in ("cache_write", "block_topk")]
)
def test_refuses_untested_sizes_by_name(impl: OpImpl, field: str, value: Any) -> None:
    layout = replace(LAYOUT, **{field: value})
    reason = impl.unsupported_reason(replace(CONTEXT, layout=layout))
    assert reason is not None
    assert field in reason


@pytest.mark.parametrize("op", ["cache_write", "paged_attention", "sparse_decode"])
def test_kernels_hold_no_host_synchronisation(op: str) -> None:
    module = importlib.import_module(f"attn_backends.ops.{op}.impl.triton")
    assert module.__file__ is not None
    with open(module.__file__) as file:
        source = file.read()
    for call in (".item(", ".tolist(", ".cpu(", "synchronize("):
        assert call not in source
