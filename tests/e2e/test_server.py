"""The server as users start it: flags, answers, keys, metrics, errors."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest

from tests.e2e.server import COMMAND, KEY, Server, environment, free_port, running_server

pytestmark = pytest.mark.e2e

AT_ONCE = 2  # commands, of a gigabyte each


@pytest.fixture(scope="module")
def server(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log.txt"
    flags = ["--attention-backend", "sink_window", "--window-tokens", "128"]
    flags += ["--sink-tokens", "32", "--max-model-len", "2048"]
    with running_server(
        model_path, log, *flags, "--kv-cache-memory-bytes", str(200 << 20)
    ) as running:
        yield running


def test_it_answers_chat_and_completions(server: Server, model_path: str) -> None:
    chat = {
        "model": model_path,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "max_tokens": 12,
        "temperature": 0,
    }
    status, text = server.request("/v1/chat/completions", chat)
    assert status == 200
    assert "Paris" in json.loads(text)["choices"][0]["message"]["content"]
    completion = {"model": model_path, "prompt": "word " * 600, "max_tokens": 4}
    status, text = server.request("/v1/completions", completion)
    assert status == 200
    assert json.loads(text)["usage"]["completion_tokens"] == 4


def test_metrics_count_the_rows(server: Server, model_path: str) -> None:
    body = {"model": model_path, "prompt": "word " * 500, "max_tokens": 8, "ignore_eos": True}
    assert server.request("/v1/completions", body)[0] == 200
    status, text = server.request("/metrics")
    assert status == 200
    lines = [line for line in text.splitlines() if line.startswith("vllm_ext:")]
    selected = next(line for line in lines if 'reason="selected"' in line)
    assert float(selected.split()[-1]) >= 7
    assert 'vllm_ext:activation_ratio{method="SINK_WINDOW"} 1.0' in lines
    held = [line for line in lines if line.startswith("vllm_ext:kv_blocks_held{")]
    assert [line.split()[-1] for line in held] == ["0.0"]  # an idle server holds nothing


def test_the_api_key_is_enforced(server: Server, model_path: str) -> None:
    body = {"model": model_path, "prompt": "hello", "max_tokens": 1}
    assert server.request("/v1/completions", body, key=None)[0] == 401
    assert server.request("/v1/completions", body, key="wrong")[0] == 401


def test_no_route_but_health_does_anything_without_the_key(server: Server) -> None:
    logged = re.findall(r"Route: (\S+), Methods: (.+)", server.log.read_text())
    calls = [(path, method.strip()) for path, names in logged for method in names.split(",")]
    schema = json.loads(server.request("/openapi.json")[1])["paths"]
    calls += [(path, method.upper()) for path in schema for method in schema[path]]
    assert {"/invocations", "/metrics", "/inference/v1/generate"} < {path for path, _ in calls}
    opened = {
        path
        for path, method in calls
        if server.request(
            re.sub(r"\{.*?\}", "x", path), b"{}" if method == "POST" else None, None, method
        )[0]
        != 401
    }
    assert opened == {"/health"}
    assert server.request("/metrics", key=None, method="OPTIONS")[0] == 401


def test_it_listens_on_loopback_only(server: Server) -> None:
    own = psutil.Process(server.process.pid).net_connections(kind="inet")
    assert {c.laddr.ip for c in own if c.laddr.port == server.port} == {"127.0.0.1"}
    listening = {
        connection.laddr
        for process in server.family()
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert [address for address in listening if not address.ip.startswith("127.")] == []


@pytest.mark.parametrize(
    ("body", "words"),
    [
        pytest.param(b'{"model": "x", "prompt"', "JSON", id="malformed-json"),
        pytest.param(b"\xff\xfe", "", id="not-utf8"),
        pytest.param(b"[]", "", id="not-an-object"),
        pytest.param({"prompt": "word " * 2100, "max_tokens": 1}, "2048", id="too-long"),
        pytest.param({"prompt": [10**9], "max_tokens": 1}, "vocabulary", id="unknown-token"),
        pytest.param({"prompt": "hi", "max_tokens": -1}, "max_tokens", id="negative-length"),
    ],
)
def test_bad_requests_are_4xx_with_a_message(
    server: Server, model_path: str, body: Any, words: str
) -> None:
    if isinstance(body, dict):
        body = {"model": model_path, **body}
    status, text = server.request("/v1/completions", body)
    assert status in (400, 422), text
    message = json.loads(text)["error"]["message"]
    assert words in message
    assert message


def test_options_that_cannot_be_honoured_are_a_400(server: Server, model_path: str) -> None:
    body = {"model": model_path, "prompt": "hi", "vllm_xargs": {"budget_tokens": 64}}
    status, text = server.request("/v1/completions", body)
    assert status == 400
    assert "SINK_WINDOW takes no per-request options" in text


def test_it_listens_on_loopback_and_prints_a_curl_line(server: Server) -> None:
    log = server.log.read_text()
    assert f"ready on http://127.0.0.1:{server.port}" in log
    assert f"curl -s http://127.0.0.1:{server.port}/v1/chat/completions" in log
    assert KEY not in log.split("vllm-ext: ready on")[1].split("\n\n")[1]


# Flags, and words of the message that they end in.
MISTAKES = {
    "second-server": (["--port", "PORT"], ["another --port"]),
    "typo": (["--windw-tokens", "5"], ["--windw-tokens", "--window-tokens"]),
    "unknown-backend": (["--attention-backend", "NOPE"], ["NOPE", "SINK_WINDOW"]),
    "fp8-kv": (
        ["--attention-backend", "SINK_WINDOW", "--kv-cache-dtype", "fp8"],
        ["does not support", "fp8", "--no-strict"],
    ),
    "window-below-a-block": (
        ["--attention-backend", "SINK_WINDOW", "--window-tokens", "48", "--block-size", "64"],
        ["window_tokens is 48", "block of 64"],
    ),
    "missing-profile": (
        ["--attention-backend", "TIDAL_DECODE", "--profile", "gone.json"],
        ["gone.json", "cannot be read"],
    ),
}


@pytest.fixture(scope="module")
def mistaken(server: Server, model_path: str) -> dict[str, subprocess.CompletedProcess[str]]:
    """What commands with mistakes said; some at a time, since each takes seconds to say it."""

    def run(flags: list[str]) -> subprocess.CompletedProcess[str]:
        flags = [str(server.port) if flag == "PORT" else flag for flag in flags]
        if "--port" not in flags:
            flags = ["--port", str(free_port()), *flags]
        return subprocess.run(
            [*COMMAND, model_path, *flags],
            env=environment() | {"VLLM_LOGGING_LEVEL": "ERROR"},
            capture_output=True,
            text=True,
            timeout=120,
        )

    with ThreadPoolExecutor(AT_ONCE) as pool:
        done = pool.map(run, [flags for flags, _ in MISTAKES.values()])
        return dict(zip(MISTAKES, done, strict=True))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_in_a_short_error(
    mistaken: dict[str, subprocess.CompletedProcess[str]], mistake: str
) -> None:
    done = mistaken[mistake]
    assert done.returncode == 2
    message = next(line for line in done.stderr.splitlines() if "error:" in line)
    for word in MISTAKES[mistake][1]:
        assert word in message
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) < 25
