"""Policies through the engine: nothing changes nothing, and freeing changes no answer.

The yardstick of a policy with window layers is the same policy with ``retention: all``.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e.engine import run_engine, tokens_of

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

NEW_TOKENS = 16
LENGTHS = (200, 350, 800, 1300, 2100)
SETTINGS = {"budget_tokens": 256, "min_context_tokens": 300}
# What the shipped profile says of these layers: writing it down changes nothing.
UNCHANGED = {
    "settings": SETTINGS,
    "layers": [
        {"layers": 0, "role": "dense"},
        {"layers": [1, 3, 7, 8, 14, 18, 20, 21], "role": "anchor"},
        {"layers": "22-29", "role": "reuse", "retention": "all"},
    ],
}
# 18 layers keep everything, twice 6 free: groups of 6, so that anchors and the layers that
# follow them are spread over three groups.
WINDOW_LAYERS = ([0, 4, 11, 19, 22, 29], [2, 5, 9, 16, 24, 27])


def _windowed(retention: str) -> dict[str, Any]:
    return {
        "settings": SETTINGS,
        "layers": [
            {
                "layers": layers,
                "role": "window",
                "retention": retention,
                "sink_tokens": sink_tokens,
                "window_tokens": window_tokens,
            }
            for layers, sink_tokens, window_tokens in zip(
                WINDOW_LAYERS, (40, 0), (200, 170), strict=True
            )
        ],
        "budgets": [{"up_to_tokens": 1000, "budget_tokens": 320}],
        "presets": {"deep": {"budget_tokens": 1024}},
    }


def _engine(model_path: str, settings: dict[str, Any], **options: Any) -> dict[str, Any]:
    return {
        "model": model_path,
        "dtype": "float32",
        "max_model_len": 3200,
        "kv_cache_memory_bytes": 800 << 20,
        "enforce_eager": True,
        "attention_backend": "TIDAL_DECODE",
        "additional_config": {"vllm_ext": settings},
        **options,
    }


@pytest.fixture(scope="module")
def job(prompts: list[list[int]]) -> dict[str, Any]:
    """Prompts below and above all thresholds; the last one names a preset."""
    chosen = [prompt for prompt in prompts if len(prompt) in LENGTHS]
    return {"prompts": chosen, "together": False, "max_tokens": NEW_TOKENS}


@pytest.fixture(scope="module")
def plain(model_path: str, job: dict[str, Any]) -> dict[str, Any]:
    """TIDAL_DECODE without a policy."""
    return run_engine(_engine(model_path, SETTINGS), [job])


def _with_preset(job: dict[str, Any], together: bool) -> dict[str, Any]:
    options = [None] * (len(LENGTHS) - 1) + [{"sparse": "deep"}]
    return {**job, "together": together, "extra_args": options}


@pytest.fixture(scope="module")
def kept(model_path: str, job: dict[str, Any]) -> dict[str, Any]:
    """The policy with window layers that free nothing."""
    engine = _engine(model_path, {"policy": _windowed("all")})
    return run_engine(engine, [_with_preset(job, together=False)])


def test_a_policy_that_changes_nothing_changes_nothing(
    model_path: str, job: dict[str, Any], plain: dict[str, Any]
) -> None:
    answer = run_engine(_engine(model_path, {"policy": UNCHANGED}), [job])
    assert answer["jobs"] == plain["jobs"]  # logprobs, too, to the last bit
    assert answer["rows"] == plain["rows"]


def test_window_layers_are_in_force_and_counted(
    plain: dict[str, Any], kept: dict[str, Any]
) -> None:
    pairs = zip(plain["jobs"][0], kept["jobs"][0], strict=True)
    changed = sum(abs(a["logprobs"][0] - b["logprobs"][0]) > 0.01 for a, b in pairs)
    assert changed >= 3, "the windows changed almost nothing: are they in force?"
    assert kept["freed_blocks"] == [0]
    per_prompt = NEW_TOKENS - 1
    assert kept["rows"] == {
        # 200 tokens are dense elsewhere, but more than a window of 170.
        "TIDAL_DECODE|sparse|window_layers": per_prompt,
        "TIDAL_DECODE|sparse|selected": 4 * per_prompt,
    }


@pytest.mark.parametrize("caching", [True, False], ids=["prefix-cache", "no-prefix-cache"])
def test_freeing_in_mixed_groups_changes_no_answer(
    model_path: str, job: dict[str, Any], kept: dict[str, Any], caching: bool
) -> None:
    engine = _engine(
        model_path,
        {"policy": _windowed("sink_window")},
        enable_prefix_caching=caching,
        max_num_batched_tokens=256,  # decode rows run beside chunks of prefills
    )
    together = _with_preset(job, together=True)
    # The second job finds all prompts in the prefix cache, where there is one.
    answer = run_engine(engine, [together, together])
    expected = tokens_of(kept["jobs"][0])
    assert [tokens_of(found) for found in answer["jobs"]] == [expected, expected]
    assert len(answer["freed_blocks"]) == 5
    assert sum(count > 0 for count in answer["freed_blocks"]) == 2
    # Five builders see every row, and one counts it.
    assert sum(answer["rows"].values()) == 2 * len(LENGTHS) * (NEW_TOKENS - 1)


def test_what_a_window_layer_generated_serves_no_other_prompt(
    model_path: str, prompts: list[list[int]]
) -> None:
    """A generates after a prompt, B's prompt is both, C's begins like B's: A must not show."""
    engine = _engine(model_path, {"policy": _windowed("sink_window")})
    prompt = next(prompt for prompt in prompts if len(prompt) == 1300)
    generate = {"prompts": [prompt], "together": False, "max_tokens": 257}
    generated = run_engine(engine, [generate])["jobs"][0][0]["tokens"]
    both = prompt + generated
    later = [
        {"prompts": [tokens], "together": False, "max_tokens": 1}
        for tokens in (both, both + prompt[:7])
    ]
    found = run_engine(engine, [generate, *later])["jobs"][-1][0]
    expected = run_engine(engine, later)["jobs"][-1][0]
    assert found["tokens"] == expected["tokens"]
    assert abs(found["logprobs"][0] - expected["logprobs"][0]) < 1e-3
