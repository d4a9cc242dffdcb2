"""FLUX: prompts are read whole, answers within a window, and what is freed changes no answer.

All layers full is stock vLLM; all layers narrowed is transformers with the mask written out; and
with some of each, the yardstick is the same profile with everything kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.engine import run_engine, small_engine, tokens_of
from tests.flux_profile import SINK_TOKENS, WINDOW_TOKENS, write_profile, write_routed_profile

pytestmark = pytest.mark.e2e

NEW_TOKENS = 40  # more than a KV block: a request that is preempted late computes a chunk of them
LENGTHS = (33, 350, 800, 1300)
LAYERS, KV_HEADS = 30, 3  # of the demo model
FULL_LAYERS = range(0, LAYERS, 2)
LOGPROB_TOLERANCE = 2e-3  # as in test_exactness.py
ROUTES = "vllm_ext:routes"
slow = pytest.mark.slow
# Engine options, and what happens to the requests.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "chunks-of-256": ({"max_num_batched_tokens": 256}, {"preempt_at": [9, 35], "abort_at": [3]}),
    "chunks-of-64": ({"max_num_batched_tokens": 64}, {"abort_at": [12], "preempt_at": [60]}),
    "chunks-of-2048": ({"max_num_batched_tokens": 2048}, {"preempt_at": [20]}),
    "no-prefix-cache": ({"enable_prefix_caching": False}, {"preempt_at": [6, 30]}),
}


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Every other layer is full."""
    path = tmp_path_factory.mktemp("flux") / "profile.json"
    return write_profile(path, LAYERS, KV_HEADS, FULL_LAYERS)


@pytest.fixture(scope="module")
def job(prompts: list[list[int]]) -> dict[str, Any]:
    """Prompts of 33 to 1,300 tokens, all at once."""
    chosen = [ids for ids in prompts if len(ids) in LENGTHS]
    return {"prompts": chosen, "together": True, "max_tokens": NEW_TOKENS}


@pytest.fixture(scope="module")
def kept(model_path: str, profile: str, job: dict[str, Any]) -> list[dict[str, Any]]:
    """The answers when nothing is freed."""
    settings = {"profile": profile, "retention": "keep_all"}
    run = run_engine(small_engine(model_path, "FLUX", settings, 400), [job])
    assert run["freed_blocks"] == [0]
    answers: list[dict[str, Any]] = run["jobs"][0]
    return answers


@slow
@pytest.mark.parametrize("case", CASES)
def test_layers_that_free_answer_as_layers_that_keep(
    case: str, model_path: str, profile: str, job: dict[str, Any], kept: list[dict[str, Any]]
) -> None:
    options, events = CASES[case]
    engine = small_engine(model_path, "FLUX", {"profile": profile}, 160, **options)
    run = run_engine(engine, [job | events, job])  # the second finds prompts in the prefix cache
    for answers in run["jobs"]:
        assert tokens_of(answers) == tokens_of(kept)
        for got, expected in zip(answers, kept, strict=True):
            assert got["logprobs"] == pytest.approx(expected["logprobs"], abs=LOGPROB_TOLERANCE)
    assert [freed > 0 for freed in run["freed_blocks"]] in ([False, True], [True, False])
    assert run["lost_blocks"] == 0
    assert {key.split("|")[1] for key in run["rows"]} == {"sparse"}
    if "preempt_at" in events:
        assert run["preemptions"] > 0


@slow
def test_all_layers_full_is_stock_vllm(
    model_path: str, job: dict[str, Any], tmp_path: Path
) -> None:
    full = write_profile(tmp_path / "profile.json", LAYERS, KV_HEADS, range(LAYERS))
    stock, ours = (
        run_engine(small_engine(model_path, backend, {"profile": full}, 400), [job], env)
        for backend, env in ((None, {"VLLM_EXT_DISABLE": "1"}), ("FLUX", None))
    )
    assert tokens_of(ours["jobs"][0]) == tokens_of(stock["jobs"][0])
    assert ours["rows"].keys() == {"FLUX|dense|no_sparse_layers"}


@slow
def test_a_request_that_asks_for_everything_is_stock_vllm_beside_others(
    model_path: str, profile: str, job: dict[str, Any], kept: list[dict[str, Any]]
) -> None:
    stock_engine = small_engine(model_path, None, {}, 400)
    stock = run_engine(stock_engine, [job], {"VLLM_EXT_DISABLE": "1"})["jobs"][0]
    asked = [None if number % 2 else {"sparse": "off"} for number in range(len(job["prompts"]))]
    events = {"preempt_at": [15, 40]}
    engine = small_engine(model_path, "FLUX", {"profile": profile}, 160)
    run = run_engine(engine, [job | events | {"extra_args": asked}])
    expected = [stock[number] if one else kept[number] for number, one in enumerate(asked)]
    assert tokens_of(run["jobs"][0]) == tokens_of(expected)
    assert run["rows"]["FLUX|dense|request_off"] > 0
    assert run["preemptions"] > 0
    assert run["lost_blocks"] == 0


def test_answers_follow_the_rule_of_the_method_by_their_requests_routes(
    model_path: str, job: dict[str, Any], tmp_path: Path
) -> None:
    """The prompt sees everything, the answer sinks and window; generated tokens are forced. A
    router of all layers makes the longest answer see everything, too.
    """
    from transformers import AutoModelForCausalLM

    weights = torch.zeros(1, LAYERS, KV_HEADS)
    weights[0, LAYERS // 2] = 0.01  # a witness; what decides is the length
    router = {"weights": weights, "log_tokens": torch.ones(1), "bias": -torch.tensor([500.0]).log()}
    routed = write_routed_profile(tmp_path / "profile.json", [], [range(LAYERS)], router)
    prompts = job["prompts"][:3]  # the longest costs the reference most
    run = run_engine(
        small_engine(model_path, "FLUX", {"profile": routed}, 120),
        [job | {"prompts": prompts, "preempt_at": [30]}],
    )
    assert run["routes"] == [[0, 0, 1]]
    assert {key: value for key, value in run["figures"].items() if key.startswith(ROUTES)} == {
        f"{ROUTES}|sparse": 2,
        f"{ROUTES}|full": 1,
    }
    assert {key.rpartition("|")[2] for key in run["rows"]} >= {"selected", "routed_full"}
    assert run["freed_blocks"][0] > 0
    assert run["preemptions"] > 0
    assert run["lost_blocks"] == 0
    model = AutoModelForCausalLM.from_pretrained(
        model_path, dtype=torch.float32, attn_implementation="sdpa"
    )
    for prompt, answer, route in zip(prompts, run["jobs"][0], run["routes"][0], strict=True):
        ids = torch.tensor([prompt + answer["tokens"][:-1]])
        row, column = torch.arange(ids.shape[1])[:, None], torch.arange(ids.shape[1])[None, :]
        is_whole = (row < len(prompt)) | torch.tensor(bool(route))
        is_seen = is_whole | (column < SINK_TOKENS) | (column > row - WINDOW_TOKENS)
        visible = (column <= row) & is_seen
        mask = torch.where(visible, 0.0, torch.finfo(torch.float32).min)[None, None]
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask).logits[0, len(prompt) - 1 :]
        best = logits.log_softmax(-1).max(-1)
        assert answer["tokens"] == best.indices.tolist()
        assert answer["logprobs"] == pytest.approx(best.values.tolist(), abs=LOGPROB_TOLERANCE)


@slow
def test_what_was_generated_serves_no_later_prompt(
    model_path: str, profile: str, job: dict[str, Any]
) -> None:
    prompt = job["prompts"][-1]
    generate = {"prompts": [prompt], "together": False, "max_tokens": 100}
    engine = small_engine(model_path, "FLUX", {"profile": profile}, 300)
    both = prompt + run_engine(engine, [generate])["jobs"][0][0]["tokens"]
    later = {"prompts": [both], "together": False, "max_tokens": 1}
    (found,) = run_engine(engine, [generate, later])["jobs"][-1]
    (expected,) = run_engine(engine, [later])["jobs"][-1]
    assert found["tokens"] == expected["tokens"]
    assert found["logprobs"] == pytest.approx(expected["logprobs"], abs=1e-3)
