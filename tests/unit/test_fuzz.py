"""The fuzzer itself: it must not overload the server, and must blame the right code."""

from __future__ import annotations

import argparse
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from deploy.chaos.fuzz import draw_and_send, grouped
from deploy.chaos.fuzz_adapter import TARGETS, adapter_weights
from deploy.chaos.fuzz_client import (
    CUT_OFF,
    HUNG_UP,
    STREAMED_ERROR,
    Answer,
    Fuzzer,
    frames_of_ours,
)
from deploy.chaos.fuzz_options import (
    MAX_PROMPT_TOKENS,
    MAX_TOGETHER,
    Burst,
    OptionSpace,
    answer_of,
    bursts,
    is_repeatable,
)
from deploy.chaos.fuzz_requests import HostileRequest, bounded, raw_requests, valid_bodies

OURS = """ERROR 11-24 06:00:00 [x.py:1] Traceback (most recent call last):
  File "/site-packages/vllm/v1/engine/input_processor.py", line 430, in process_inputs
  File "/work/vllm_ext/platforms/selection.py", line 80, in check_request
(APIServer pid=1) ERROR 11-24 06:00:00 [x.py:1] {raised}
"""


def _fuzzer(**settings: Any) -> Fuzzer:
    given = {"minutes": 1, "server_log": None, "model": "m", "adapter": [], "canary_every": 99}
    return Fuzzer(argparse.Namespace(**given, **settings))


def _request(**body: Any) -> HostileRequest:
    return HostileRequest("options", "POST", "/v1/completions", json.dumps(body).encode())


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"prompt": "x"}, {"prompt": "x", "max_tokens": 4}),
        ({"input": "x", "max_output_tokens": 10**9}, {"input": "x", "max_output_tokens": 4}),
        ({"messages": [], "max_tokens": "9000"}, {"messages": [], "max_tokens": 4}),
        ({"sampling_params": {}}, {"sampling_params": {"max_tokens": 4}}),
        ({"prompt": "x", "max_tokens": -7, "n": 50}, {"prompt": "x", "max_tokens": -7, "n": 2}),
        ([{"n": 9}], [{"n": 2}]),
        ("text", "text"),
    ],
)
def test_bodies_are_bounded(body: Any, expected: Any) -> None:
    assert bounded(body) == expected


def test_what_is_sent_as_valid_is_within_the_bounds() -> None:
    for body in valid_bodies("m").values():
        assert bounded(body).items() >= body.items()


def test_raw_requests_reach_every_route_with_a_body() -> None:
    sent = list(raw_requests("m", 64))
    assert {request.path for request in sent} > set(valid_bodies("m"))
    assert any(len(request.body or b"") > 1_000_000 for request in sent)


def test_errors_inside_streams_are_seen() -> None:
    openai = 'data: {"id": 1}\n\ndata: {"error": {"message": "m", "code": 500}}\n'
    anthropic = 'event: error\ndata: {"type":"error","error":{"type":"t","message":"m"}}\n'
    assert (STREAMED_ERROR.search(openai) or [""])[1] == "500"
    assert STREAMED_ERROR.search(anthropic) is not None
    assert STREAMED_ERROR.search('data: {"choices": [{"text": "error"}]}\n') is None


@pytest.mark.parametrize(
    ("raised", "is_ours"),
    [("KeyError: 'x'", True), ("vllm.exceptions.VLLMValidationError: budget", False)],
)
def test_a_traceback_through_our_code_is_ours_unless_we_refused(
    tmp_path: Path, raised: str, is_ours: bool
) -> None:
    log = tmp_path / "log.txt"
    log.write_text(OURS.replace("{raised}", raised))
    fuzzer = _fuzzer()
    fuzzer._args.server_log = log
    fuzzer._note_server_error(HostileRequest("raw", "POST", "/x", b"{}"), CUT_OFF, "", 0)
    (error,) = fuzzer.server_errors
    assert error["raised"] == raised
    assert error["ours"] == (["vllm_ext/platforms/selection.py:80"] if is_ours else [])
    assert not fuzzer.failures


def test_errors_are_grouped_by_cause_with_the_smallest_request() -> None:
    def error(body: Any, raised: str) -> dict[str, Any]:
        return {"path": "/x", "status": "500", "raised": raised, "body": json.dumps(body)}

    groups = grouped([error([1, 2], "A"), error([], "A"), error({}, "B")])
    assert [(group["count"], group["body"]) for group in groups] == [(2, "[]"), (1, "{}")]


def test_in_a_burst_a_refusal_excuses_itself_only() -> None:
    refused = OURS.replace("{raised}", "vllm.exceptions.VLLMValidationError: budget")
    broken = OURS.replace("{raised}", "KeyError: 'x'").replace("line 80", "line 90")
    assert frames_of_ours(refused) == []
    assert frames_of_ours(refused + broken) == ["vllm_ext/platforms/selection.py:90"]
    assert frames_of_ours(broken + refused) == ["vllm_ext/platforms/selection.py:90"]
    assert frames_of_ours(broken.partition("(APIServer")[0]) != []  # what it raised is not known


@cache
def _drawn() -> list[Burst]:
    drawn: list[Burst] = []
    draw_and_send(bursts(OptionSpace(("base", "tiny"), 256)), 150, 0, drawn.append)
    return drawn


def test_bursts_reach_the_whole_space_within_its_bounds() -> None:
    drawn = _drawn()
    assert {len(burst.requests) for burst in drawn} == {1, 2, 3, MAX_TOGETHER}
    assert any(burst.is_compared for burst in drawn)
    sent = [request for burst in drawn for request in burst.requests]
    assert any(request.hang_up_s for request in sent)
    bodies = [json.loads(request.body or b"") for request in sent]
    assert {body["model"] for body in bodies} == {"base", "tiny"}
    sampled = [body.get("sampling_params", body) for body in bodies]
    wanted = ("seed", "n", "logprobs", "prompt_logprobs", "echo", "presence_penalty", "stop",
              "logit_bias", "min_p", "structured_outputs", "response_format", "use_beam_search",
              "stream", "vllm_xargs", "extra_args")  # fmt: skip
    assert not [name for name in wanted if not any(name in body for body in (*bodies, *sampled))]
    assert all(1 <= body["max_tokens"] <= 8 and body.get("n", 1) <= 3 for body in sampled)
    prompts = [body.get("token_ids") or body.get("prompt") or [] for body in bodies]
    lengths = [len(prompt) for prompt in prompts if isinstance(prompt, list)]
    assert max(lengths) > 256  # several chunks
    assert max(lengths) <= MAX_PROMPT_TOKENS + 9


def test_what_is_compared_is_greedy_or_seeded() -> None:
    compared = [burst for burst in _drawn() if burst.is_compared]
    assert all(len(burst.requests) > 1 for burst in compared)
    assert all(is_repeatable(burst.requests[0]) for burst in compared)
    assert is_repeatable(_request(temperature=1, seed=0))
    assert is_repeatable(_request(temperature=0))
    assert not is_repeatable(_request(temperature=1))
    assert not is_repeatable(_request(temperature=1, seed=-1))
    assert not is_repeatable(_request(sampling_params={"temperature": 1}, temperature=0))


def test_answers_are_read_from_streams_and_bodies_alike() -> None:
    said = [(0, "ab", []), (1, "c", [])]
    choices = [{"index": 1, "text": "c"}, {"index": 0, "text": "ab"}]
    assert answer_of(json.dumps({"choices": choices})) == said
    pieces = [(0, "a"), (1, "c"), (0, "b")]
    events = [{"choices": [{"index": i, "delta": {"content": text}}]} for i, text in pieces]
    lines = [*(f"data: {json.dumps(event)}" for event in events), 'data: {"choices": []}']
    assert answer_of("\n\n".join([*lines, "data: [DONE]", ""])) == said
    chat = {"choices": [{"index": 0, "message": {"content": None}}]}
    assert answer_of(json.dumps(chat)) == [(0, "", [])]
    for streamed in ([[7, 8, 9]], [[7], [8, 9]]):  # vLLM joins what a slow reader has not read
        events = [{"choices": [{"index": 0, "token_ids": ids}]} for ids in streamed]
        lines = [f"data: {json.dumps(event)}" for event in events]
        assert answer_of("\n\n".join(lines)) == [(0, "", [7, 8, 9])]


@pytest.mark.parametrize(("beside", "num_failures"), [("b", 1), ("a", 0)])
def test_another_answer_beside_others_is_a_failure(
    beside: str, num_failures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fuzzer = _fuzzer()
    texts = iter(["a", beside, "x", "a"])  # alone; the two of the burst; alone again

    def answer(self: Fuzzer, request: HostileRequest) -> Answer:
        return Answer("200", json.dumps({"choices": [{"index": 0, "text": next(texts)}]}))

    monkeypatch.setattr(Fuzzer, "_ask", answer)
    monkeypatch.setattr(Fuzzer, "ask_canary", lambda self: None)
    monkeypatch.setattr(fuzzer._threads, "map", map)  # in order
    fuzzer.send_burst(Burst((_request(temperature=0), _request(seed=1)), is_compared=True))
    assert (fuzzer.num_bursts, fuzzer.num_compared, fuzzer.num_sent) == (1, 1, 3)
    assert len(fuzzer.failures) == num_failures


def test_hanging_up_is_no_failure_and_a_lost_connection_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fuzzer = _fuzzer()
    fuzzer._canary_due = 99
    asked: list[str] = []
    monkeypatch.setattr(Fuzzer, "ask_canary", lambda self: asked.append("canary"))
    monkeypatch.setattr(Fuzzer, "_ask", lambda self, request: Answer(HUNG_UP))
    fuzzer.send_together([_request()])
    assert (fuzzer.failures, asked) == ([], ["canary"])
    monkeypatch.setattr(Fuzzer, "_ask", lambda self, request: Answer("connection lost: X"))
    fuzzer.send_together([_request(), _request()])
    assert len(fuzzer.failures) == 2


def test_an_adapter_fits_the_models_projections() -> None:
    config = {
        "hidden_size": 12,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
    }
    weights = adapter_weights(config, rank=8, scale=0.5)
    assert len(weights) == 3 * len(TARGETS) * 2
    start = "base_model.model.model.layers.2.self_attn."
    assert weights[start + "v_proj.lora_A.weight"].shape == (8, 12)
    assert weights[start + "v_proj.lora_B.weight"].shape == (6, 8)
    assert weights[start + "q_proj.lora_B.weight"].shape == (12, 8)
