"""MOA: heads that see and keep different tokens, and what is freed changes no answer.

Three classes of heads (``tests/moa_profile.py``) free blocks in a pool of tiles. The yardstick is
the same rules with everything kept, in blocks of whole layers: no head has a table of its own. With
nothing hidden it is stock vLLM, and with the same window everywhere SINK_WINDOW.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.engine import run_engine, small_engine, tokens_of
from tests.e2e.reference import masked_reference
from tests.moa_profile import FLOOR_TOKENS, SINK_TOKENS, write_profile, write_rules

pytestmark = pytest.mark.e2e

NEW_TOKENS = 16
LENGTHS = (33, 350, 800, 1300)
LAYERS, QUERY_HEADS, KV_HEADS = 30, 9, 3  # of the demo model
slow = pytest.mark.slow
DEFAULT = "chunks-of-256"
# Engine options, and what happens to the requests. The pool holds about two of them.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "chunks-of-256": ({"max_num_batched_tokens": 256}, {"preempt_at": [9, 15], "abort_at": [3]}),
    "chunks-of-64": ({"max_num_batched_tokens": 64}, {"abort_at": [12]}),
    "chunks-of-2048": ({"max_num_batched_tokens": 2048}, {}),
    "no-prefix-cache": ({"enable_prefix_caching": False}, {"preempt_at": [6]}),
}


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three classes of equally many heads."""
    return write_profile(tmp_path_factory.mktemp("moa") / "profile.json", LAYERS, KV_HEADS)


@pytest.fixture(scope="module")
def some_prompts(prompts: list[list[int]]) -> list[list[int]]:
    """Of chosen lengths, from 33 to 1,300 tokens."""
    return [ids for ids in prompts if len(ids) in LENGTHS]


@pytest.fixture(scope="module")
def kept(model_path: str, profile: str, some_prompts: list[list[int]]) -> list[dict[str, Any]]:
    """The answers when nothing is freed and heads share their layer's table."""
    job = {"prompts": some_prompts, "together": True, "max_tokens": NEW_TOKENS}
    settings = {"profile": profile, "retention": "keep_all"}
    run = run_engine(small_engine(model_path, "MOA", settings, 400), [job])
    assert run["freed_blocks"] == [0]
    answers: list[dict[str, Any]] = run["jobs"][0]
    return answers


@pytest.mark.parametrize(
    "case", [DEFAULT, *(pytest.param(case, marks=slow) for case in CASES if case != DEFAULT)]
)
def test_heads_that_free_answer_as_heads_that_keep(
    case: str,
    model_path: str,
    profile: str,
    some_prompts: list[list[int]],
    kept: list[dict[str, Any]],
) -> None:
    options, events = CASES[case]
    job = {"prompts": some_prompts, "together": True, "max_tokens": NEW_TOKENS}
    engine = small_engine(model_path, "MOA", {"profile": profile}, 80, **options)
    run = run_engine(engine, [job | events, job])
    for answers in run["jobs"]:
        assert tokens_of(answers) == tokens_of(kept)
        for got, expected in zip(answers, kept, strict=True):
            assert got["logprobs"] == pytest.approx(expected["logprobs"], abs=1e-3)
    assert len(run["freed_blocks"]) == 3, "one KV group per class"
    assert sum(freed > 0 for freed in run["freed_blocks"]) == 2, "two classes free blocks"
    assert run["lost_blocks"] == 0
    if "preempt_at" in events:
        assert run["preemptions"] > 0


@slow
def test_heads_that_see_everything_are_stock_vllm(
    model_path: str, some_prompts: list[list[int]], tmp_path: Path
) -> None:
    """By a file in MoA's published format."""
    rules = write_rules(tmp_path / "rules.json", LAYERS, QUERY_HEADS)
    job = {"prompts": some_prompts, "together": True, "max_tokens": NEW_TOKENS}
    stock, ours = (
        run_engine(small_engine(model_path, backend, {"rules": rules}, 400), [job], env)
        for backend, env in ((None, {"VLLM_EXT_DISABLE": "1"}), ("MOA", None))
    )
    assert tokens_of(ours["jobs"][0]) == tokens_of(stock["jobs"][0])
    assert {key.split("|")[0] for key in ours["rows"]} == {"MOA"}


@slow
def test_the_same_span_everywhere_is_sink_window(
    model_path: str, some_prompts: list[list[int]], tmp_path: Path
) -> None:
    profile = write_profile(tmp_path / "profile.json", LAYERS, KV_HEADS, [[0, 0]])
    window = {"sink_tokens": SINK_TOKENS, "window_tokens": FLOOR_TOKENS}
    job = {"prompts": some_prompts, "together": True, "max_tokens": NEW_TOKENS}
    window_run, ours = (
        run_engine(small_engine(model_path, backend, settings, 400), [job])
        for backend, settings in (("SINK_WINDOW", window), ("MOA", {"profile": profile}))
    )
    assert ours["jobs"] == window_run["jobs"]
    assert ours["freed_blocks"] == window_run["freed_blocks"]


@slow
def test_published_rules_are_served(
    model_path: str, some_prompts: list[list[int]], tmp_path: Path
) -> None:
    """Query heads of a group see what their own rules show, sinks inside; the KV head keeps all of
    it. The yardstick knows of no KV heads.
    """
    published = ((0, 0.5), (300, 0.0), (-32, 0.25), (128, 0.125))
    rules = write_rules(tmp_path / "rules.json", LAYERS, QUERY_HEADS, *published)
    job = {"prompts": some_prompts, "together": True, "max_tokens": NEW_TOKENS}
    runs = [
        run_engine(small_engine(model_path, "MOA", {"rules": rules} | settings, 400), [job])
        for settings in ({}, {"retention": "keep_all"})
    ]
    evicting, keeping = (tokens_of(run["jobs"][0]) for run in runs)
    assert evicting == keeping

    def sees(row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        """Of each query head, ``[heads, rows, columns]``."""
        heads = []
        for head in range(QUERY_HEADS):
            alpha, beta = published[head % len(published)]
            elastic = alpha - 64 + int(64 * beta) * (row + 1) // 64
            heads.append((column < 64) | (column > row - elastic.clamp_min(64)))
        return torch.stack(heads)

    answers = runs[0]["jobs"][0]
    for (tokens, logprobs), answer in zip(
        masked_reference(model_path, some_prompts, answers, sees), answers, strict=True
    ):
        assert answer["tokens"] == tokens
        assert answer["logprobs"] == pytest.approx(logprobs, abs=2e-3)
    assert runs[0]["freed_blocks"][0] > 0
    assert runs[0]["lost_blocks"] == 0
