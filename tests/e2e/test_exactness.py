"""Exactness anchors on the real model, whatever the batching, chunking, cache or preemption.

All in fp32: there, two correct implementations differ by about 1e-5 in a logit and greedy
tokens are the same; in bf16 the logits themselves tie.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from attn_backends.config import known_settings
from attn_backends.method import Purpose
from attn_backends.methods import REGISTRY, load_method
from tests.e2e.engine import run_engine, tokens_of
from tests.e2e.reference import Mask, masked_reference
from vllm_ext.evaluation.run import settings_reaching

pytestmark = pytest.mark.e2e

NEW_TOKENS = 12
SINK, WINDOW = 40, 200  # neither a multiple of the block size; most prompts exceed their sum
LOGPROB_TOLERANCE = 2e-3  # fp32, 30 layers, another summation order; typical error 1e-5
MAX_TOKENS = 3200


@dataclass(frozen=True)
class Case:
    """A method and what it must equal.

    Attributes:
        method: of the registry.
        settings: ours.
        visible: which tokens (columns) a query (row) sees, for transformers; None: all, and the
            reference is stock vLLM.
    """

    method: str
    settings: dict[str, Any]
    visible: Mask | None = None


def _reading_everything(name: str, **settings: Any) -> Case | None:
    """A reach of the whole context: selection, reuse and the rest must add up to dense."""
    method = load_method(name)
    given = known_settings(method.config_cls, {"min_context_tokens": 0}) | settings
    reaching = settings_reaching(method, given, MAX_TOKENS)
    if reaching is None and method.purpose is not Purpose.CHECK:
        return None  # nothing that these tests could set makes it read everything
    return Case(name, reaching or given)


def _sees_sinks_and_window(row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    return (column < SINK) | (column > row - WINDOW)


CASES = {name: case for name in REGISTRY if (case := _reading_everything(name))} | {
    "SINK_WINDOW": Case(
        "SINK_WINDOW", {"sink_tokens": SINK, "window_tokens": WINDOW}, _sees_sinks_and_window
    ),
    "TIDAL_DECODE, full anchors": _reading_everything("TIDAL_DECODE", anchor_attention="full"),
    "TIDAL_DECODE, kept selections": _reading_everything("TIDAL_DECODE", reselect_steps=8),
}
# An engine costs most of a minute: these two use every part that the others use.
QUICK_CASES = ("SINK_WINDOW", "TIDAL_DECODE")


def _cases(*names: str) -> list[Any]:
    """Parameters, of which only ``QUICK_CASES`` are in the default suite."""
    return [pytest.param(n, marks=() if n in QUICK_CASES else pytest.mark.slow) for n in names]


def _engine(model_path: str, case: str | None, **options: Any) -> dict[str, Any]:
    engine = {
        "model": model_path,
        "dtype": "float32",
        "max_model_len": MAX_TOKENS,
        "kv_cache_memory_bytes": 1200 << 20,
        "enforce_eager": True,
        **options,
    }
    if case is not None:
        engine |= {
            "attention_backend": CASES[case].method,
            "additional_config": {"vllm_ext": CASES[case].settings},
        }
    return engine


@pytest.fixture(scope="module")
def some_prompts(prompts: list[list[int]]) -> list[list[int]]:
    """All but the longest: 2,100 tokens are more than one chunk, too, and much less work."""
    return prompts[:-1]


@pytest.fixture(scope="module")
def stock(model_path: str, some_prompts: list[list[int]]) -> list[dict[str, Any]]:
    """Stock vLLM, the extension switched off, every prompt alone."""
    job = {"prompts": some_prompts, "together": False, "max_tokens": NEW_TOKENS}
    answer = run_engine(_engine(model_path, None), [job], {"VLLM_EXT_DISABLE": "1"})
    return list(answer["jobs"][0])


@pytest.fixture(scope="module", params=_cases(*CASES))
def served(
    request: pytest.FixtureRequest, model_path: str, some_prompts: list[list[int]]
) -> tuple[str, dict[str, Any]]:
    """A case's answers: alone, together, and again with everything in the prefix cache."""
    alone = {"prompts": some_prompts, "together": False, "max_tokens": NEW_TOKENS}
    together = alone | {"together": True}
    answer = run_engine(_engine(model_path, request.param), [alone, together])
    return request.param, answer


def test_alone_equals_the_reference(
    served: tuple[str, dict[str, Any]],
    stock: list[dict[str, Any]],
    model_path: str,
    some_prompts: list[list[int]],
) -> None:
    case, answer = served
    alone, sees = answer["jobs"][0], CASES[case].visible
    if sees is None:
        assert tokens_of(alone) == tokens_of(stock)
        expected = [reference["logprobs"] for reference in stock]
    else:
        reference = masked_reference(model_path, some_prompts, alone, sees)
        assert tokens_of(alone) == [tokens for tokens, _ in reference]
        expected = [logprobs for _, logprobs in reference]
        pairs = zip(alone, stock, strict=True)
        changed = sum(abs(a["logprobs"][0] - b["logprobs"][0]) > 0.01 for a, b in pairs)
        assert changed >= 4, "the mask changed almost nothing: is it in force?"
    for got, want in zip(alone, expected, strict=True):
        assert got["logprobs"] == pytest.approx(want, abs=LOGPROB_TOLERANCE)


def test_together_and_prefix_cached_equals_alone(served: tuple[str, dict[str, Any]]) -> None:
    _, answer = served
    alone, together = answer["jobs"]  # the second job finds all prompts in the prefix cache
    assert tokens_of(together) == tokens_of(alone)


def test_every_decode_row_was_sparse(
    served: tuple[str, dict[str, Any]], some_prompts: list[list[int]]
) -> None:
    case, answer = served
    assert {key.split("|")[1] for key in answer["rows"]} == {"sparse"}
    # The first token of an answer comes from prefill, of a prefix-cached prompt too.
    assert sum(answer["rows"].values()) == 2 * len(some_prompts) * (NEW_TOKENS - 1)
    assert {key.split("|")[0] for key in answer["rows"]} == {CASES[case].method}


SCHEDULING: dict[str, dict[str, Any]] = {
    "chunks-of-64": {"max_num_batched_tokens": 64, "max_num_seqs": 16},
    "blocks-of-128-uncached": {"enable_prefix_caching": False, "block_size": 128},
}
QUICK_SCHEDULING = ("TIDAL_DECODE", "chunks-of-64")


@pytest.mark.parametrize(
    ("served", "scheduling"),
    [
        pytest.param(*pair, marks=() if pair == QUICK_SCHEDULING else pytest.mark.slow)
        for pair in itertools.product(CASES, SCHEDULING)
    ],
    indirect=["served"],
)
def test_scheduling_does_not_change_answers(
    served: tuple[str, dict[str, Any]],
    model_path: str,
    some_prompts: list[list[int]],
    scheduling: str,
) -> None:
    case, answer = served
    # The longest first: decode rows then run beside chunks of long prefills.
    job = {"prompts": some_prompts[::-1], "together": True, "max_tokens": NEW_TOKENS}
    other = run_engine(_engine(model_path, case, **SCHEDULING[scheduling]), [job])
    assert tokens_of(other["jobs"][0])[::-1] == tokens_of(answer["jobs"][0])


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(name, marks=() if name == "SINK_WINDOW" else pytest.mark.slow)
        for name in CASES
        if name in REGISTRY
    ],
)
def test_preemption_does_not_change_answers(
    model_path: str, prompts: list[list[int]], case: str
) -> None:
    """Four prompts of 25 full blocks in a pool of 103: the first decoded token needs 104."""
    starts = (0, 700, 1400, 2100)
    alone = {
        "prompts": [prompts[-1][start : start + 800] for start in starts],
        "together": False,
        "max_tokens": NEW_TOKENS,
    }
    engine = _engine(model_path, case, num_gpu_blocks_override=104)
    # Evicting, a method holds too little to be preempted here: test_retention.py forces that.
    config_cls = load_method(CASES[case].method).config_cls
    kept = known_settings(config_cls, {"retention": "keep_all"})
    engine["additional_config"] = {"vllm_ext": CASES[case].settings | kept}
    answer = run_engine(engine, [alone, alone | {"together": True}])
    first, second = (tokens_of(job) for job in answer["jobs"])
    assert answer["preemptions"] > 0
    assert first == second


def test_a_prefix_hit_that_leaves_one_token_is_prefilled(
    model_path: str, prompts: list[list[int]]
) -> None:
    """A small budget would show in the first answer token, and in a block that others reuse."""
    job = {"prompts": [prompts[-1][: 32 * 32 + 1]], "together": False, "max_tokens": 4}
    engine = _engine(model_path, "TIDAL_DECODE")
    engine["additional_config"] = {"vllm_ext": {"budget_tokens": 128, "min_context_tokens": 0}}
    answer = run_engine(engine, [job, job])
    (fresh,), (hit,) = answer["jobs"]
    assert hit["tokens"] == fresh["tokens"]
    assert hit["logprobs"] == pytest.approx(fresh["logprobs"], abs=1e-4)
    assert answer["rows"] == {"TIDAL_DECODE|sparse|selected": 2 * 3}


@pytest.mark.slow
def test_requests_with_budgets_of_their_own(
    model_path: str, some_prompts: list[list[int]], stock: list[dict[str, Any]]
) -> None:
    """Rows of one batch keep their own budgets; dense ones are stock vLLM's."""
    each, kept = (_budgets_of_their_own(model_path, some_prompts, stock, n) for n in (1, 4))
    assert each[0]["logprobs"] != kept[0]["logprobs"], "nothing was kept"
    assert each[1]["tokens"] == kept[1]["tokens"]


def _budgets_of_their_own(
    model_path: str, some_prompts: list[list[int]], stock: list[dict[str, Any]], reselect_steps: int
) -> list[dict[str, Any]]:
    """The answers alone, after comparison with those together."""
    chosen = [-2, -1, -2, -1]  # prompts of 1,300 and 2,100 tokens: shorter ones are served dense
    extra_args = [{"budget_tokens": 128}, {"sparse": "off"}, None, {"budget_tokens": 256}]
    alone = {
        "prompts": [some_prompts[i] for i in chosen],
        "extra_args": extra_args,
        "together": False,
        "max_tokens": NEW_TOKENS,
    }
    engine = _engine(model_path, "TIDAL_DECODE")
    engine["additional_config"] = {
        "vllm_ext": {"budget_tokens": 512, "reselect_steps": reselect_steps}
    }
    answer = run_engine(engine, [alone, alone | {"together": True}])
    first, second = (tokens_of(job) for job in answer["jobs"])
    assert first == second
    assert first[1] == stock[-1]["tokens"]
    steps = NEW_TOKENS - 1
    assert answer["rows"]["TIDAL_DECODE|dense|request_off"] == 2 * steps
    assert answer["rows"]["TIDAL_DECODE|sparse|selected"] == 6 * steps
    return list(answer["jobs"][0])
