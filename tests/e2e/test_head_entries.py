"""Heads that keep different blocks: what is freed changes no answer.

Three classes of heads (``tests/span_method.py``) free blocks in a pool of tiles. The yardstick is
the same rules with everything kept, in blocks of whole layers: no head has a table of its own.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e.engine import run_engine
from tests.span_method import LINE, NAME

pytestmark = pytest.mark.e2e

NEW_TOKENS = 16
LENGTHS = (33, 350, 800, 1300)
slow = pytest.mark.slow
DEFAULT = "chunks-of-256"
# Engine options, and what happens to the requests. The pool holds about two of them.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "chunks-of-256": ({"max_num_batched_tokens": 256}, {"preempt_at": [9, 15], "abort_at": [3]}),
    "chunks-of-64": ({"max_num_batched_tokens": 64}, {"abort_at": [12]}),
    "chunks-of-2048": ({"max_num_batched_tokens": 2048}, {}),
    "no-prefix-cache": ({"enable_prefix_caching": False}, {"preempt_at": [6]}),
}


def _engine(model_path: str, retention: str, kv_mib: int, **options: Any) -> dict[str, Any]:
    return {
        "model": model_path,
        "dtype": "float32",
        "max_model_len": 1600,
        "kv_cache_memory_bytes": kv_mib << 20,
        "enforce_eager": True,
        "attention_backend": NAME,
        "additional_config": {"vllm_ext": {"retention": retention}},
        "max_num_batched_tokens": 512,
        **options,
    }


def _run(engine: dict[str, Any], jobs: list[dict[str, Any]]) -> dict[str, Any]:
    return run_engine(engine, jobs, registry={NAME: LINE})


@pytest.fixture(scope="module")
def some_prompts(prompts: list[list[int]]) -> list[list[int]]:
    """Of chosen lengths, from 33 to 1,300 tokens."""
    return [ids for ids in prompts if len(ids) in LENGTHS]


@pytest.fixture(scope="module")
def kept(model_path: str, some_prompts: list[list[int]]) -> list[dict[str, Any]]:
    """The answers when nothing is freed and heads share their layer's table."""
    job = {"prompts": some_prompts, "together": True, "max_tokens": NEW_TOKENS}
    run = _run(_engine(model_path, "keep_all", 400), [job])
    assert run["freed_blocks"] == [0]
    answers: list[dict[str, Any]] = run["jobs"][0]
    return answers


@pytest.mark.parametrize(
    "case", [DEFAULT, *(pytest.param(case, marks=slow) for case in CASES if case != DEFAULT)]
)
def test_heads_that_free_answer_as_heads_that_keep(
    case: str, model_path: str, some_prompts: list[list[int]], kept: list[dict[str, Any]]
) -> None:
    options, events = CASES[case]
    job = {"prompts": some_prompts, "together": True, "max_tokens": NEW_TOKENS}
    run = _run(_engine(model_path, "evict", 80, **options), [job | events, job])
    for answers in run["jobs"]:
        assert [one["tokens"] for one in answers] == [one["tokens"] for one in kept]
        for got, expected in zip(answers, kept, strict=True):
            assert got["logprobs"] == pytest.approx(expected["logprobs"], abs=1e-3)
    assert len(run["freed_blocks"]) == 3, "one KV group per class"
    assert sum(freed > 0 for freed in run["freed_blocks"]) == 2, "two classes free blocks"
    assert run["lost_blocks"] == 0
    if "preempt_at" in events:
        assert run["preemptions"] > 0
