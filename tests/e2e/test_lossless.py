"""Lossless mode on the demo model: the answers are stock vLLM's, whatever is drafted.

All in fp32, as in test_exactness.py. Budgets are small and no context is short, so that drafts are
sparse, and wrong now and then.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from attn_backends.adapter.speculation import speculative_arguments
from tests.e2e.engine import run_engine, tokens_of
from tests.e2e.reference import masked_reference

pytestmark = pytest.mark.e2e

NEW_TOKENS = 24
LOGPROB_TOLERANCE = 2e-3  # see test_exactness.py
BUDGET = {"budget_tokens": 128, "min_context_tokens": 0}
DRAFTERS: dict[str, dict[str, Any]] = {
    "TIDAL_DECODE": BUDGET,
    "ORACLE_TOPK": BUDGET,
    "SINK_WINDOW": {"sink_tokens": 32, "window_tokens": 96, "retention": "keep_all"},
}
STOCK = {"VLLM_EXT_DISABLE": "1"}


def _engine(
    model_path: str, tokens: int, method: str = "TIDAL_DECODE", **options: Any
) -> dict[str, Any]:
    """An engine that drafts; 0 tokens: stock vLLM."""
    engine = {
        "model": model_path,
        "dtype": "float32",
        "max_model_len": 3200,
        "kv_cache_memory_bytes": 1200 << 20,
        "enforce_eager": True,
        **options,
    }
    if tokens:
        settings = {**DRAFTERS[method], "lossless_tokens": tokens}
        engine |= {
            "attention_backend": method,
            "additional_config": {"vllm_ext": settings},
            "speculative_config": speculative_arguments(model_path, tokens),
        }
    return engine


def _job(prompts: list[list[int]], **more: Any) -> dict[str, Any]:
    return {"prompts": prompts, "together": True, "max_tokens": NEW_TOKENS, **more}


def _assert_same(got: list[dict[str, Any]], want: list[dict[str, Any]]) -> None:
    """Tokens and their log-probabilities."""
    assert tokens_of(got) == tokens_of(want)
    for one, other in zip(got, want, strict=True):
        assert one["logprobs"] == pytest.approx(other["logprobs"], abs=LOGPROB_TOLERANCE)


def test_answers_are_dense_ones(model_path: str, prompts: list[list[int]]) -> None:
    """The quick one: a few prompts together, then two alone from the prefix cache."""
    chosen = [prompts[i] for i in (0, 4, 11, 12)]
    small = {"max_model_len": 1024, "kv_cache_memory_bytes": 256 << 20}
    jobs = [_job(chosen), _job(chosen[2:], together=False)]
    answer = run_engine(_engine(model_path, 3, **small), jobs)
    together, alone = answer["jobs"]
    dense = masked_reference(model_path, chosen, together, lambda row, column: column <= row)
    _assert_same(together, [{"tokens": own, "logprobs": logprobs} for own, logprobs in dense])
    _assert_same(alone, together[2:])
    drafts, figures = answer["drafts"], answer["figures"]
    assert drafts["draft_tokens"] == 3 * drafts["drafts"] > 0
    assert drafts["accepted_tokens"] > drafts["draft_tokens"] // 2
    assert drafts["accepted_tokens"] < drafts["draft_tokens"], "is any draft sparse?"
    assert figures["vllm_ext:draft_rows|selected"] > 0
    assert figures["vllm_ext:verify_rows"] >= drafts["drafts"]
    assert answer["rows"] == {}, "sparse rows answered"
    assert answer["lost_blocks"] == 0


@pytest.fixture(scope="module")
def stock(model_path: str, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """Stock vLLM's answers, each prompt alone; longer than those that are compared."""
    job = _job(prompts, together=False, max_tokens=NEW_TOKENS + 10)
    return list(run_engine(_engine(model_path, 0), [job], STOCK)["jobs"][0])


def _begun(answers: list[dict[str, Any]], num_tokens: int = NEW_TOKENS) -> list[dict[str, Any]]:
    keys = ("tokens", "logprobs")
    return [{key: answer[key][:num_tokens] for key in keys} for answer in answers]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "tokens"),
    [*itertools.product(["TIDAL_DECODE"], (1, 3, 8)), ("ORACLE_TOPK", 3), ("SINK_WINDOW", 3)],
)
def test_all_prompts_alone_and_together(
    model_path: str,
    prompts: list[list[int]],
    stock: list[dict[str, Any]],
    method: str,
    tokens: int,
) -> None:
    jobs = [_job(prompts, together=together) for together in (False, True)]
    answer = run_engine(_engine(model_path, tokens, method), jobs)
    for got in answer["jobs"]:
        _assert_same(got, _begun(stock))
    assert 0 < answer["drafts"]["accepted_tokens"] < answer["drafts"]["draft_tokens"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "scheduling",
    [
        {"max_num_batched_tokens": 64, "max_num_seqs": 16},
        {"enable_prefix_caching": False, "block_size": 128},
        {"enforce_eager": False},
    ],
    ids=["chunks-of-64", "blocks-of-128-uncached", "compiled"],
)
def test_scheduling_does_not_change_answers(
    model_path: str,
    prompts: list[list[int]],
    stock: list[dict[str, Any]],
    scheduling: dict[str, Any],
) -> None:
    # The longest first: drafts then run beside chunks of long prompts.
    engine = _engine(model_path, 3, **scheduling)
    answer = run_engine(engine, [_job(prompts[::-1])])
    _assert_same(answer["jobs"][0][::-1], _begun(stock))
    assert answer["lost_blocks"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("is_async", [False, True], ids=["in-step", "asynchronous, graphs"])
def test_the_runner_of_gpus_gives_the_same_answers(
    model_path: str, prompts: list[list[int]], is_async: bool
) -> None:
    """Prompts of 33 to 511 tokens, in chunks; the second time from the prefix cache. There, drafts
    are made before anybody knows which of the last ones were right, and all but the first steps of
    a request are graphs' (``recorded_graphs.py``): one verifies, one is the first draft, one each
    later one.
    """
    chosen = [prompts[i] for i in (4, 9, 11)]
    small = {"max_model_len": 1024, "kv_cache_memory_bytes": 256 << 20}
    small |= {"max_num_batched_tokens": 256, "max_num_seqs": 4}
    job = _job(chosen, max_tokens=12)  # the sampler's kernels are slow, interpreted
    stock = run_engine(_engine(model_path, 0, **small), [job], STOCK)["jobs"][0]
    v2 = {"is_async": is_async, "has_graphs": is_async}
    answer = run_engine(_engine(model_path, 3, **small), [job, job], v2=v2)
    assert answer["is_async"] is is_async
    verified, drafted = (
        answer["replays"].get(name, 0) for name in ("ModelCudaGraphManager|4", "CudaGraphManager|1")
    )
    assert (verified > 4) is is_async
    assert (drafted > 12) is is_async
    for got in answer["jobs"]:
        _assert_same(got, stock)
    drafts, figures = answer["drafts"], answer["figures"]
    assert drafts["draft_tokens"] // 2 < drafts["accepted_tokens"] < drafts["draft_tokens"]
    assert figures["vllm_ext:draft_rows|selected"] > 0
    assert answer["rows"] == {}, "sparse rows answered"
    assert answer["lost_blocks"] == 0


@pytest.mark.slow
def test_preemption_does_not_change_answers(model_path: str, prompts: list[list[int]]) -> None:
    """Four prompts of 25 full blocks in a pool of 103; what runs in a step is preempted."""
    parts = [prompts[-1][start : start + 800] for start in (0, 700, 1400, 2100)]
    small = {"num_gpu_blocks_override": 104}
    (stock,) = run_engine(_engine(model_path, 0, **small), [_job(parts)], STOCK)["jobs"]
    answer = run_engine(_engine(model_path, 3, **small), [_job(parts), _job(parts, preempt_at=[4])])
    for got in answer["jobs"]:
        _assert_same(got, stock)
    assert answer["preemptions"] >= 3
    assert answer["lost_blocks"] == 0


@pytest.mark.slow
def test_generated_blocks_serve_later_prompts(model_path: str, prompts: list[list[int]]) -> None:
    """A second turn hits what the first one generated: it was verified, so it is exact."""
    prompt = prompts[11][:320]
    first = _job([prompt], max_tokens=130)
    (stock,), _ = run_engine(_engine(model_path, 0), [first, first], STOCK)["jobs"]
    longer = prompt + stock["tokens"][:128] + prompts[5][:20]
    jobs = [first, _job([longer])]
    expected = run_engine(_engine(model_path, 0, enable_prefix_caching=False), jobs, STOCK)["jobs"]
    answer = run_engine(_engine(model_path, 3), jobs)
    for got, want in zip(answer["jobs"], expected, strict=True):
        _assert_same(got, want)
    assert answer["prefix_hits"] >= len(prompt) + 96, "no generated block was hit"


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [3, 8])
@pytest.mark.parametrize("right", [False, True])
def test_known_drafts_are_rejected_or_accepted(
    model_path: str,
    prompts: list[list[int]],
    stock: list[dict[str, Any]],
    tokens: int,
    right: bool,
) -> None:
    pairs = list(zip(prompts, tokens_of(stock), strict=True))[5:]  # what drafts: several blocks
    num_new = 1 + 2 * (tokens + 1)  # the prompt's, then steps that bring all of their tokens
    job = _job([prompt for prompt, _ in pairs], max_tokens=num_new)
    known = {"answers": pairs, "right": right}
    answer = run_engine(_engine(model_path, tokens), [job], known=known)
    _assert_same(answer["jobs"][0], _begun(stock[5:], num_new))
    drafts = answer["drafts"]
    assert drafts["drafts"] == len(pairs) * (2 if right else num_new - 1)
    assert drafts["accepted_tokens"] == (drafts["draft_tokens"] if right else 0)


@pytest.mark.slow
def test_up_to_the_longest_request(model_path: str, prompts: list[list[int]]) -> None:
    """Where drafts would pass the model's length, vLLM drafts nothing."""
    parts = [prompts[-1][:400], prompts[-1][600:990]]
    short = {"max_model_len": 421}
    job = _job(parts, max_tokens=60)
    (stock,) = run_engine(_engine(model_path, 0, **short), [job], STOCK)["jobs"]
    answer = run_engine(_engine(model_path, 8, **short), [job])
    _assert_same(answer["jobs"][0], stock)
    assert [len(one["tokens"]) for one in stock] == [21, 31]
    assert answer["drafts"]["accepted_tokens"] > 0


@pytest.mark.slow
def test_what_requests_ask_of_the_sampler(
    model_path: str, prompts: list[list[int]], stock: list[dict[str, Any]]
) -> None:
    """Stops inside a draft, log-probabilities, penalties, minima, bad words, JSON, dense rows."""
    chosen = [prompts[i] for i in (9, 11, 12)]
    words = _texts(model_path, stock[12]["tokens"])
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    asked: list[dict[str, Any]] = [
        {"detokenize": True, "stop": [words[7] + words[8]]},
        {"detokenize": True, "stop": [words[5]], "include_stop_str_in_output": True},
        {"stop_token_ids": [stock[12]["tokens"][6]]},
        {"logprobs": 5},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.4},
        {"min_tokens": 9, "ignore_eos": False},
        {"bad_words": [words[3]], "detokenize": True},
        {"json_schema": schema, "detokenize": True, "ignore_eos": False},
    ]
    jobs = [_job(chosen, params=params) for params in asked]
    jobs += [_job(chosen, extra_args=[{"sparse": "off"}, None, {"budget_tokens": 256}])]
    plain = [{key: job[key] for key in job if key != "extra_args"} for job in jobs]
    expected = run_engine(_engine(model_path, 0), plain, STOCK)["jobs"]
    answer = run_engine(_engine(model_path, 4), jobs)
    for params, got, want in zip([*asked, {}], answer["jobs"], expected, strict=True):
        _assert_same(got, want)
        assert [one["text"] for one in got] == [one["text"] for one in want], params
    for stopped in expected[:3]:
        assert min(len(one["tokens"]) for one in stopped) < NEW_TOKENS, "nothing was stopped"
    assert answer["figures"]["vllm_ext:draft_rows|request_off"] > 0


def _texts(model_path: str, tokens: list[int]) -> list[str]:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model_path)
    return [tokenizer.decode([token]) for token in tokens]


SAMPLED = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 20},
    {"temperature": 1.2, "top_p": 0.7},
]


@pytest.mark.slow
@pytest.mark.parametrize("params", SAMPLED, ids=["all", "top_k", "top_p"])
def test_sampled_answers_have_stock_s_distribution(
    model_path: str, prompts: list[list[int]], params: dict[str, Any]
) -> None:
    """The third token, which verification samples behind two accepted drafts or instead of one."""
    stats = pytest.importorskip("scipy.stats")
    sampled = {"temperature": 1.0, "n": 1, "logprobs": None} | params
    num_answers = 800
    job = _job([prompts[9][:192]] * num_answers, max_tokens=4, params=sampled)
    small = {"max_model_len": 256, "max_num_seqs": 64}
    counts = []
    for tokens, env in ((0, STOCK), (3, None)):
        (answers,) = run_engine(_engine(model_path, tokens, **small), [job], env)["jobs"]
        third = [answer["tokens"][2] for answer in answers]
        counts.append({token: third.count(token) for token in set(third)})
    stock, ours = counts
    common = [token for token, count in stock.items() if count + ours.get(token, 0) >= 16]
    table = [[one.get(token, 0) for token in common] for one in counts]
    for row in table:
        row.append(num_answers - sum(row))  # all rare ones
    if sum(row[-1] for row in table) == 0:
        table = [row[:-1] for row in table]
    assert len(table[0]) >= 3
    assert stats.chi2_contingency(table).pvalue > 1e-3
