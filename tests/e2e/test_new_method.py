"""A method from outside the package is served by one module and one line of the registry."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.e2e.server import running_server
from tests.toy_method import NAME

pytestmark = pytest.mark.e2e

FLAGS = ("--attention-backend", NAME, "--toy-dense-layers", "2", "--budget-tokens", "128")
COMMAND = [sys.executable, "-m", "tests.e2e.toy_serve"]
NEW_TOKENS = 6


def test_it_is_served_and_counted(
    model_path: str, prompts: list[list[int]], tmp_path: Path
) -> None:
    body = {"model": model_path, "prompt": prompts[-1][:1500], "max_tokens": NEW_TOKENS}
    body |= {"temperature": 0, "ignore_eos": True}
    with running_server(model_path, tmp_path / "log", *FLAGS, command=COMMAND) as server:
        status, text = server.request("/v1/completions", body)
        assert status == 200, text
        assert json.loads(text)["usage"]["completion_tokens"] == NEW_TOKENS
        dense = body | {"vllm_xargs": {"sparse": "off"}}
        assert server.request("/v1/completions", dense)[0] == 200
        lines = server.request("/metrics")[1].splitlines()
    rows = f'vllm_ext:decode_rows_total{{method="{NAME}",path='
    assert f'{rows}"sparse",reason="selected"}} {NEW_TOKENS - 1}.0' in lines
    assert f'{rows}"dense",reason="request_off"}} {NEW_TOKENS - 1}.0' in lines
    assert f'vllm_ext:activation_ratio{{method="{NAME}"}} 0.5' in lines
