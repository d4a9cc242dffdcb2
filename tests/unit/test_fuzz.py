"""The fuzzer itself: it must not overload the server, and must blame the right code."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from deploy.fuzz import grouped
from deploy.fuzz_client import CUT_OFF, STREAMED_ERROR, Fuzzer
from deploy.fuzz_requests import HostileRequest, bounded, raw_requests, valid_bodies

OURS = """ERROR 11-24 06:00:00 [x.py:1] Traceback (most recent call last):
  File "/site-packages/vllm/v1/engine/input_processor.py", line 430, in process_inputs
  File "/work/vllm_ext/platforms/selection.py", line 80, in check_request
(APIServer pid=1) ERROR 11-24 06:00:00 [x.py:1] {raised}
"""


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
    fuzzer = Fuzzer(argparse.Namespace(minutes=1, server_log=log))
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
