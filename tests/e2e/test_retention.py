"""Eviction changes no answer: it only frees what selection does not read.

The yardstick is SINK_WINDOW with ``retention: keep_all``, which selects and frees nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from attn_backends.checkpoint import fingerprint
from tests.e2e.engine import run_engine, tokens_of

pytestmark = pytest.mark.e2e

NEW_TOKENS = 24
FULL_LAYERS = [2, 3, 9, 17, 24, 29]
CASES: dict[str, dict[str, Any]] = {
    "as-it-comes": {},
    "no-prefix-cache": {"enable_prefix_caching": False},
    "chunks-of-64": {"max_num_batched_tokens": 64},
    "chunks-of-2048": {"max_num_batched_tokens": 2048},
}


@pytest.fixture(scope="module")
def profile(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Six layers keep everything, the others have the window."""
    path = tmp_path_factory.mktemp("profile") / "layers.json"
    path.write_text(
        json.dumps(
            {
                "schema_version": 1,
                "fingerprint": fingerprint(Path(model_path)),
                "model": "demo",
                "num_layers": 30,
                "num_kv_heads": 3,
                "dense_layers": list(range(30)),
                "anchor_layers": [],
                "head_maps": {},
                "full_layers": FULL_LAYERS,
                "calibration": {},
            }
        )
    )
    return str(path)


def _engine(model_path: str, retention: str, profile: str, **options: Any) -> dict[str, Any]:
    settings = {
        "sink_tokens": 40,
        "window_tokens": 200,
        "retention": retention,
        "profile": profile,
    }
    return {
        "model": model_path,
        "dtype": "float32",
        "max_model_len": 3200,
        "kv_cache_memory_bytes": 1200 << 20,
        "enforce_eager": True,
        "attention_backend": "SINK_WINDOW",
        "additional_config": {"vllm_ext": settings},
        **options,
    }


@pytest.fixture(scope="module", params=["all-layers", "layer-groups"])
def kept(
    request: pytest.FixtureRequest, model_path: str, prompts: list[list[int]], profile: str
) -> tuple[str, list[list[int]]]:
    """The profile in use (or none), and the answers when nothing is freed."""
    used = profile if request.param == "layer-groups" else ""
    job = {"prompts": prompts, "together": False, "max_tokens": NEW_TOKENS}
    answer = run_engine(_engine(model_path, "keep_all", used), [job])
    assert answer["freed_blocks"] == [0] * len(answer["freed_blocks"])
    return used, tokens_of(answer["jobs"][0])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_eviction_frees_and_changes_nothing(
    kept: tuple[str, list[list[int]]], model_path: str, prompts: list[list[int]], case: str
) -> None:
    profile, expected = kept
    job = {"prompts": prompts, "together": True, "max_tokens": NEW_TOKENS}
    # The second job finds sinks and tails of all prompts in the prefix cache.
    answer = run_engine(_engine(model_path, "evict", profile, **CASES[case]), [job, job])
    assert [tokens_of(found) for found in answer["jobs"]] == [expected, expected]
    groups = answer["freed_blocks"]
    assert len(groups) == (5 if profile else 1)
    assert sum(count > 0 for count in groups) == (4 if profile else 1)


@pytest.mark.slow
def test_preemption_and_aborts_in_prefill_change_nothing(
    kept: tuple[str, list[list[int]]], model_path: str, prompts: list[list[int]]
) -> None:
    profile, expected = kept
    job = {
        "prompts": prompts,
        "together": True,
        "max_tokens": NEW_TOKENS,
        "preempt_at": [3, 9, 20, 40],
        "abort_at": [2, 5, 12],
    }
    engine = _engine(model_path, "evict", profile, max_num_batched_tokens=512)
    answer = run_engine(engine, [job])
    assert tokens_of(answer["jobs"][0]) == expected
    assert sum(answer["freed_blocks"]) > 0
