"""Full decode graphs of vLLM's V2 runner, captured and replayed without a GPU
(``recorded_graphs.py``): the answers are those of the runner without graphs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from attn_backends.methods import REGISTRY
from tests.e2e.engine import run_engine, small_engine, tokens_of
from tests.flux_profile import write_routed_profile

pytestmark = [pytest.mark.e2e, pytest.mark.slow]  # vLLM's sampler is slow, interpreted

NEW_TOKENS = 8
LOGPROB_TOLERANCE = 2e-3  # see test_exactness.py
# So that something is left out of prompts of 33 to 511 tokens; MOA has its own profile.
CHOOSING = {"budget_tokens": 128, "min_context_tokens": 0}
SETTINGS: dict[str, dict[str, Any]] = {
    "TIDAL_DECODE": CHOOSING,
    "ORACLE_TOPK": CHOOSING,
    "SINK_WINDOW": {"sink_tokens": 32, "window_tokens": 96},
}


def _settings(method: str, folder: Path) -> dict[str, Any]:
    """FLUX routes every other layer full in short prompts, sparse in long ones."""
    if method != "FLUX":
        return SETTINGS.get(method, {})
    router = {"weights": torch.zeros(1, 30, 3), "log_tokens": torch.tensor([-1.0])}
    router["bias"] = torch.tensor([5.0])
    groups = [range(1, 30, 2)]
    path = folder / "profile.json"
    return {"profile": write_routed_profile(path, range(0, 30, 2), groups, router)}


@pytest.mark.parametrize("method", [*REGISTRY])
def test_replayed_steps_give_the_same_answers(
    model_path: str, prompts: list[list[int]], method: str, tmp_path: Path
) -> None:
    """Three rows in a graph of four; retention, heads with caches of their own and routes too."""
    job = {"prompts": [prompts[i] for i in (4, 9, 11)], "together": True, "max_tokens": NEW_TOKENS}
    options: dict[str, Any] = {"max_num_batched_tokens": 256, "max_num_seqs": 4}
    engine = small_engine(model_path, method, _settings(method, tmp_path), 256, **options)
    expected = run_engine(engine, [job])
    answer = run_engine(engine, [job], v2={"is_async": True, "has_graphs": True})
    assert answer["replays"] == {"ModelCudaGraphManager|1": NEW_TOKENS - 1}
    (got,), (want,) = answer["jobs"], expected["jobs"]
    assert tokens_of(got) == tokens_of(want)
    for one, other in zip(got, want, strict=True):
        assert one["logprobs"] == pytest.approx(other["logprobs"], abs=LOGPROB_TOLERANCE)
    assert answer["rows"] == expected["rows"]
    reasons = {key.rpartition("|")[2] for key in answer["rows"]}
    assert ("selected" in reasons) is (method != "SPARSE_FULL"), "is anything left out?"
    assert answer["routes"] == expected["routes"]
    assert len({*answer["routes"][0]}) == (2 if method == "FLUX" else 1)
    assert answer["freed_blocks"] == expected["freed_blocks"]
    assert answer["lost_blocks"] == 0
