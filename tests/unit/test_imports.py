"""The domain imports without vLLM, Ray and Triton; heavy imports stay lazy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]

BLOCK = """
import sys
for name in ("triton", "triton.language", "vllm", "ray"):
    sys.modules[name] = None  # import raises ModuleNotFoundError
"""

IMPORT_DOMAIN = """
import importlib, pkgutil
import attn_backends, kvcache
names = []
for package in (attn_backends, kvcache):
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        parts = found.name.split(".")
        if "adapter" in parts or parts[-1] == "__main__":
            continue
        importlib.import_module(found.name)
        names.append(found.name)
assert "attn_backends.ops.sparse_decode.impl.triton" in names, names
assert "kvcache.layout" in names, names
"""

OPS = """
import importlib, pkgutil
import attn_backends.ops as ops
OPS = [found.name for found in pkgutil.iter_modules(ops.__path__) if found.ispkg]
APIS = [importlib.import_module(f"attn_backends.ops.{op}.api") for op in OPS]
known = {"anchor_decode", "block_topk", "cache_write", "paged_attention", "sparse_decode"}
assert known <= set(OPS), OPS
"""

ASK_TRITON = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import torch
from attn_backends.ops.dispatch import OpContext, resolve
from kvcache.layout import KVOrder, PagedKVLayout
layout = PagedKVLayout(4, 32, 2, 64, torch.bfloat16, KVOrder.FUSED)
context = OpContext(layout, 4, "cpu", True)
for api in APIS:
    impls = [impl for impl in api.implementations() if impl.name != "cpu"]
    reasons = {impl.name: impl.unsupported_reason(context) for impl in impls}
    assert "triton cannot be imported" in reasons["triton"], reasons
    assert reasons["reference"] is None, reasons
"""

NOTHING_HEAVY = """
import sys
for api in APIS:
    assert {"cpu", "triton", "reference"} <= {impl.name for impl in api.implementations()}, api
heavy = [name for name in ("triton", "vllm", "ray") if name in sys.modules]
assert not heavy, heavy
"""


def _run_fresh(code: str) -> None:
    """Runs code in a fresh interpreter; its traceback is the failure message."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_domain_imports_without_triton_vllm_and_ray() -> None:
    _run_fresh(BLOCK + IMPORT_DOMAIN)


def test_triton_says_why_it_cannot_serve_and_the_reference_can() -> None:
    _run_fresh(BLOCK + OPS + ASK_TRITON)


def test_listing_implementations_imports_nothing_heavy() -> None:
    _run_fresh(OPS + NOTHING_HEAVY)
