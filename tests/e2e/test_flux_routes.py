"""An engine's routes are what transformers' attention says they must be, whatever happens to it.

Thresholds of the routers lie between the prompts' scores, with margins far above rounding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.engine import run_engine, small_engine, tokens_of
from tests.flux_profile import SINK_TOKENS, WINDOW_TOKENS, write_profile, write_routed_profile

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

NEW_TOKENS = 40
LENGTHS = (33, 350, 800, 1300)
LAYERS, KV_HEADS = 30, 3  # of the demo model
EVIDENCE_TOKENS, LEAST_MARGIN = 32, 0.01
FULL_LAYERS = range(0, LAYERS, 3)
GROUPS = [range(1, 15, 3), range(16, LAYERS, 3)]  # every third layer is left, and has the window
LOGPROB_TOLERANCE = 2e-3  # as in test_exactness.py
# Engine options, and what happens to the requests.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "chunks-of-64": ({"max_num_batched_tokens": 64}, {"abort_at": [12], "preempt_at": [25, 60]}),
    "chunks-of-256": ({"max_num_batched_tokens": 256}, {"preempt_at": [9, 35], "abort_at": [3]}),
    "chunks-of-2048": ({"max_num_batched_tokens": 2048}, {"preempt_at": [20]}),
    "one-at-a-time": ({}, {"together": False}),
    "no-prefix-cache": ({"enable_prefix_caching": False}, {"preempt_at": [6, 30]}),
    # The runner of GPUs; asynchronously, a step is planned before the last one's routes are known.
    "v2-in-step": ({}, {"preempt_at": [20]}),
    "v2-asynchronous": ({}, {"preempt_at": [20]}),
}
V2 = {"v2-in-step": {"is_async": False}, "v2-asynchronous": {"is_async": True}}


@pytest.fixture(scope="module")
def job(prompts: list[list[int]]) -> dict[str, Any]:
    """Prompts of 33 to 1,300 tokens, all at once."""
    chosen = [ids for ids in prompts if len(ids) in LENGTHS]
    return {"prompts": chosen, "together": True, "max_tokens": NEW_TOKENS}


def _evidence(model_path: str, prompts: list[list[int]]) -> torch.Tensor:
    """``[prompts, layers, kv_heads]``, by its definition, of transformers' attention."""
    from transformers import AttentionInterface, AutoModelForCausalLM

    found: list[torch.Tensor] = []

    def attend(
        module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **_: Any
    ) -> Any:
        keys, values = (
            one.repeat_interleave(query.shape[1] // KV_HEADS, 1) for one in (key, value)
        )
        token, position = torch.arange(key.shape[2]), torch.arange(key.shape[2])[:, None]
        weights = (query @ keys.mT * scaling).masked_fill(token > position, -torch.inf).softmax(-1)
        is_hidden = (token >= SINK_TOKENS) & (token <= position - WINDOW_TOKENS)
        mass = (weights * is_hidden)[0, :, -EVIDENCE_TOKENS:].sum(-1).mean(-1)
        found.append(mass.view(KV_HEADS, -1).mean(1))
        return (weights @ values).transpose(1, 2).contiguous(), None

    AttentionInterface.register("evidence", attend)
    model = AutoModelForCausalLM.from_pretrained(
        model_path, dtype=torch.float32, attn_implementation="evidence"
    )
    with torch.no_grad():
        for ids in prompts:
            model(input_ids=torch.tensor([ids]))
    return torch.stack(found).view(len(prompts), LAYERS, KV_HEADS)


@pytest.fixture(scope="module")
def routed(
    model_path: str, job: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, list[int]]:
    """A profile whose routers part the prompts, and the route of each."""
    weights = torch.zeros(2, LAYERS, KV_HEADS)
    by_head = torch.tensor([0.8, 1.0, 1.2])
    weights[0, [18, 22]], weights[1, [5, 14]] = 3 * by_head, by_head
    masses = _evidence(model_path, job["prompts"])
    scores = torch.einsum("glh,plh->gp", weights, masses)
    bias = torch.zeros(2)
    for group, rank in enumerate((2, 3)):  # the first asks for two prompts, the second for one
        ranked = scores[group].sort().values
        bias[group] = -ranked[rank - 1 : rank + 1].mean()
        assert ranked[rank] - ranked[rank - 1] > 2 * LEAST_MARGIN
    asks = scores + bias[:, None] > 0
    routes = [int(first) + 2 * int(first and second) for first, second in asks.T.tolist()]
    assert len({*routes}) == 3
    router = {"weights": weights, "log_tokens": torch.zeros(2), "bias": bias}
    path = tmp_path_factory.mktemp("flux") / "profile.json"
    return write_routed_profile(path, FULL_LAYERS, GROUPS, router), routes


@pytest.fixture(scope="module")
def kept(
    model_path: str, routed: tuple[str, list[int]], job: dict[str, Any]
) -> list[dict[str, Any]]:
    """The answers when nothing is freed."""
    settings = {"profile": routed[0], "retention": "keep_all"}
    run = run_engine(small_engine(model_path, "FLUX", settings, 400), [job])
    assert run["routes"] == [routed[1]]
    assert not any(run["freed_blocks"])
    answers: list[dict[str, Any]] = run["jobs"][0]
    return answers


@pytest.mark.parametrize("case", CASES)
def test_routes_and_answers_are_the_same_whatever_happens(
    case: str,
    model_path: str,
    routed: tuple[str, list[int]],
    job: dict[str, Any],
    kept: list[dict[str, Any]],
) -> None:
    profile, routes = routed
    options, events = CASES[case]
    engine = small_engine(model_path, "FLUX", {"profile": profile}, 200, **options)
    # The second job finds prompts in the prefix cache.
    run = run_engine(engine, [job | events, job], v2=V2.get(case))
    assert run["is_async"] is (case == "v2-asynchronous")
    assert run["routes"] == [routes, routes]
    for answers in run["jobs"]:
        assert tokens_of(answers) == tokens_of(kept)
        for got, expected in zip(answers, kept, strict=True):
            assert got["logprobs"] == pytest.approx(expected["logprobs"], abs=LOGPROB_TOLERANCE)
    assert "vllm_ext:routes|no_evidence" not in run["figures"]
    assert sum(freed > 0 for freed in run["freed_blocks"]) == 4  # two groups of the window layers
    assert run["lost_blocks"] == 0
    if "preempt_at" in events:
        assert run["preemptions"] > 0


def test_forced_routes_are_stock_vllm_and_layers_that_are_always_narrowed(
    model_path: str, job: dict[str, Any], tmp_path: Path
) -> None:
    events = {"preempt_at": [15, 40]}
    groups = [range(0, LAYERS, 2), range(1, LAYERS, 2)]
    router = {"weights": torch.zeros(2, LAYERS, KV_HEADS)}
    router |= {"log_tokens": torch.zeros(2), "bias": torch.zeros(2)}
    profile = write_routed_profile(tmp_path / "routed.json", [], groups, router)
    static = write_profile(tmp_path / "static.json", LAYERS, KV_HEADS, ())
    stock = run_engine(small_engine(model_path, None, {}, 400), [job], {"VLLM_EXT_DISABLE": "1"})
    narrowed = run_engine(small_engine(model_path, "FLUX", {"profile": static}, 400), [job])
    for routes, route, expected in (("full", 3, stock), ("sparse", 0, narrowed)):
        settings = {"profile": profile, "routes": routes}
        run = run_engine(small_engine(model_path, "FLUX", settings, 200), [job | events])
        assert run["routes"] == [[route] * len(LENGTHS)]
        assert tokens_of(run["jobs"][0]) == tokens_of(expected["jobs"][0])
        assert (sum(run["freed_blocks"]) > 0) == (routes == "sparse")
        assert (run["lost_blocks"], run["preemptions"] > 0) == (0, True)
