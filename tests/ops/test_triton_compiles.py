"""Every Triton kernel compiles for GPUs that are not there, and fits into them.

The interpreter sees no wrong types or alignments, no shape that ``tl.dot`` refuses, no tile that
shared memory or registers cannot hold. Compiling does, as a launch would compile, without a device.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
# Registers that find no place go to memory. A few outside the loop cost nothing that one sees; a
# tile that is too large spills hundreds of bytes.
MAX_SPILLED_BYTES = 128

DEFAULT = [
    ("sparse_decode", 90, "bfloat16", 128, 4, 16, "query_rule heads"),
    ("sparse_decode", 80, "float32", 80, 1, 128, "rule"),
    ("anchor_decode", 90, "bfloat16", 128, 4, 16, ""),
    ("anchor_decode", 80, "float16", 64, 8, 32, "masses"),
    ("paged_attention", 90, "bfloat16", 128, 4, 16, "query_rule"),
    ("block_topk", 90, "bfloat16", 128, 4, 16, ""),
    ("cache_write", 80, "bfloat16", 80, 4, 64, ""),
]
CAPABILITIES = (80, 86, 90)
GROUPS = (1, 4, 8, 3, 16)
QUERY_LENS = (2048, 64, 16)  # of a prefill
TURNS = 3  # of the others for each dtype and head size
BLOCK_SIZES = (16, 32, 64, 128, 48)
VARIANTS = {
    "sparse_decode": ("", "rule", "heads", "rule heads", "query_rule"),
    "anchor_decode": ("", "masses", "dense"),
    "paged_attention": ("", "rule", "query_rule"),
    "block_topk": ("",),
    "cache_write": ("",),
}


def _matrix(op: str, capability: int) -> list[tuple[Any, ...]]:
    """Every dtype with every head size, and all else as it comes; each group of 16-bit heads of 128
    plainly, too.
    """
    source = random.Random(op)
    choices = (GROUPS, BLOCK_SIZES, VARIANTS[op], QUERY_LENS)
    sizes = itertools.product(("bfloat16", "float16", "float32"), (64, 80, 128, 256), range(TURNS))
    drawn = [
        (op, capability, dtype, head_size, *map(source.choice, choices))
        for dtype, head_size, _ in sizes
    ]
    plain = [(op, capability, "bfloat16", 128, group, 16, "", 2048) for group in GROUPS]
    return drawn + plain


def _backend_is_missing() -> bool:
    spec = importlib.util.find_spec("triton")
    if spec is None or not spec.submodule_search_locations:
        return True
    tools = Path(spec.submodule_search_locations[0], "backends", "nvidia", "bin")
    return not all((tools / tool).exists() for tool in ("ptxas", "cuobjdump"))


def _compile(cases: list[tuple[Any, ...]], cache: Path) -> list[dict[str, Any]]:
    fields = ("op", "capability", "dtype", "head_size", "group", "block_size", "variant")
    request = [dict(zip((*fields, "query_len"), case, strict=False)) for case in cases]
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.triton_compiler"],
        input=json.dumps(request),
        env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


def _check(findings: list[dict[str, Any]], cases: list[tuple[Any, ...]]) -> None:
    assert len(findings) >= len(cases)
    faults = [
        finding
        for finding in findings
        if "error" in finding
        or finding["shared_bytes"] > finding["shared_limit_bytes"]
        or finding["spilled_bytes"] > MAX_SPILLED_BYTES
    ]
    assert not faults, "\n".join(map(str, faults))


needs_backend = pytest.mark.skipif(_backend_is_missing(), reason="triton without its CUDA backend")


@needs_backend
def test_every_kernel_compiles_and_fits(tmp_path: Path) -> None:
    assert {case[0] for case in DEFAULT} == set(VARIANTS)
    _check(_compile(DEFAULT, tmp_path), DEFAULT)


@pytest.mark.slow
@needs_backend
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("op", VARIANTS)
def test_every_size_compiles_and_fits(op: str, capability: int, tmp_path: Path) -> None:
    cases = _matrix(op, capability)
    _check(_compile(cases, tmp_path), cases)
