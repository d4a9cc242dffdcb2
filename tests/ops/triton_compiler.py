"""Compiles launches of our Triton kernels for a GPU that is not there.

A program (``python -m tests.ops.triton_compiler``), for the tests' own process runs Triton's
interpreter, and Triton decides at its import which it is. Reads cases from stdin, a JSON list of
objects (``Case``), and writes a list of findings, one per launch of each case.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from attn_backends.batch import BlockSelection, PagedBatch, SpanRule
from attn_backends.ops.triton_support import Launch
from kvcache.layout import KVOrder, PagedKVLayout, kv_views

SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}  # of a program, by capability
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
NUM_ROWS, NUM_BLOCKS = 4, 64
TYPE_NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Case:
    """What is launched, and for which card."""

    op: str
    capability: int
    dtype: str
    head_size: int
    group: int
    block_size: int
    max_tokens: int = 131072  # the block table's width
    variant: str = ""  # what else the op can be asked for
    query_len: int = 2048  # of the longest prefill row

    def launches(self) -> Iterable[Launch]:
        """The op's own launches, on tensors without memory."""
        launches = importlib.import_module(f"attn_backends.ops.{self.op}.impl.triton").launches
        heads, shared = 8, SHARED_BYTES[self.capability]
        dtype = getattr(torch, self.dtype)
        width = -(-self.max_tokens // self.block_size)
        layout = PagedKVLayout(
            NUM_BLOCKS, self.block_size, heads, self.head_size, dtype, KVOrder.FUSED
        )
        caches = kv_views(_tensor(*layout.shape, dtype=dtype), KVOrder.FUSED)
        # Queries lie in a wider tensor of queries, keys and values.
        num_heads = heads * self.group
        qkv = _tensor(NUM_ROWS, num_heads + 2 * heads, self.head_size, dtype=dtype)
        query, out = qkv[:, :num_heads], _tensor(NUM_ROWS, num_heads, self.head_size, dtype=dtype)
        batch = PagedBatch(
            query_start_loc=_tensor(NUM_ROWS + 1),
            seq_lens=_tensor(NUM_ROWS),
            block_table=_tensor(NUM_ROWS, width),
            num_reqs=NUM_ROWS,
            num_tokens=NUM_ROWS,
            max_query_len=self.query_len,
            max_seq_len=self.max_tokens,
        )
        num_spans = 1 if "rule" in self.variant else 0
        if "query_rule" in self.variant:
            num_spans = self.group
        rule = SpanRule(_tensor(NUM_ROWS, heads, num_spans, 4)) if num_spans else None
        mass = _tensor(NUM_ROWS, heads, width, dtype=torch.float32)
        chosen = _tensor(NUM_ROWS, heads, width), _tensor(NUM_ROWS, heads)
        mapped = _tensor(heads, dtype=torch.int64) if "heads" in self.variant else None
        selection = BlockSelection(*chosen, mapped)
        scale = self.head_size**-0.5
        match self.op:
            case "sparse_decode":
                return launches(query, *caches, batch, selection, rule, scale, out, shared)
            case "anchor_decode":
                wanted = {"dense": (out, None), "masses": (None, mass), "": (out, mass)}
                return launches(query, *caches, batch, scale, *wanted[self.variant], shared)
            case "paged_attention":
                return launches(query, *caches, batch, rule, scale, out, shared)
            case "block_topk":
                budgets = _tensor(NUM_ROWS)
                return launches(mass, batch.seq_lens, self.block_size, budgets, 2, 3, selection)
            case "cache_write":
                key, value = qkv[:, num_heads : num_heads + heads], qkv[:, num_heads + heads :]
                return launches(key, value, *caches, _tensor(NUM_ROWS, dtype=torch.int64))
        raise ValueError(f"no op {self.op}")


def _tensor(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def compile_launch(op: str, launch: Launch, capability: int) -> dict[str, Any]:
    """Compiles one launch as Triton would at its first start; what it takes of the card."""
    kernels = importlib.import_module(f"attn_backends.ops.{op}.impl.triton")._kernels()
    kernel = kernels[launch.kernel]
    signature, constants, attributes = {}, {}, {}
    given = dict(zip(kernel.arg_names, launch.arguments, strict=False)) | launch.constants
    assert set(given) == set(kernel.arg_names), set(given) ^ set(kernel.arg_names)
    for index, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value = given[name]
        is_special = not parameter.do_not_specialize
        if name in launch.constants or (is_special and type(value) is int and value == 1):
            signature[name], constants[(index,)] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPE_NAMES[value.dtype]
            offset_bytes = value.storage_offset() * value.element_size()
            is_special = offset_bytes % 16 == 0
        elif isinstance(value, float):
            signature[name], is_special = "fp32", False
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            is_special = is_special and value % 16 == 0
        if is_special:
            attributes[(index,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": launch.num_warps, "num_stages": launch.num_stages},
    )
    return {
        "kernel": launch.kernel,
        "shared_bytes": compiled.metadata.shared,
        "shared_limit_bytes": SHARED_BYTES[capability],
        **_resources(compiled.asm["cubin"]),
    }


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and the bytes of its stack, which is where spilled ones go."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return {"registers": found["REG"], "spilled_bytes": found["STACK"] + found["LOCAL"]}


if __name__ == "__main__":
    findings = []
    for fields in json.load(sys.stdin):
        case = Case(**fields)
        for launch in case.launches():
            try:
                finding = compile_launch(case.op, launch, case.capability)
            except Exception as error:  # reported with its case, by the test
                finding = {"kernel": launch.kernel, "error": f"{type(error).__name__}: {error}"}
            findings.append({"case": fields, **finding})
    json.dump(findings, sys.stdout)
