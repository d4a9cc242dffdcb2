"""Where the engine's own kernel serves prefill, and where ours does."""

from __future__ import annotations

import platform
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")
from attn_backends.adapter import ops
from attn_backends.adapter.engine_ops import cpu
from attn_backends.ops.dispatch import OpContext
from kvcache.layout import KVOrder, PagedKVLayout

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="of x86 CPUs")


@pytest.mark.parametrize(
    ("capability", "dtype", "can_build", "expected"),
    [
        ("AVX2", torch.float32, True, "cpu"),
        ("AVX2", torch.float32, False, "engine"),
        ("AVX2", torch.bfloat16, True, "cpu"),
        ("AVX512", torch.float32, True, "cpu"),
        ("AVX512", torch.bfloat16, True, "cpu"),
        ("AVX512", torch.bfloat16, False, "engine"),
        ("AVX512", torch.float16, True, "engine"),
    ],
)
def test_prefill_goes_where_it_is_faster(
    capability: str, dtype: torch.dtype, can_build: bool, expected: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    reason = None if can_build else "no compiler"
    monkeypatch.setattr(cpu.native, "unavailable_reason", lambda: reason)
    monkeypatch.setattr(ops, "_IN_USE", {})
    layout = PagedKVLayout(1, 32, 3, 64, dtype, KVOrder.KEY_TRANSPOSED)
    chosen = ops.engine_and_our_ops(OpContext(layout, 9, "cpu", with_rule=False), "auto")
    assert chosen.paged_attention.name == expected
