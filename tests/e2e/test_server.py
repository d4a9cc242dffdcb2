"""The server as users start it: flags, answers, keys, metrics, errors."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.e2e

KEY = "test-key"
COMMAND = [str(Path(sys.executable).with_name("vllm-ext")), "serve"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _environment() -> dict[str, str]:
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    env.pop("TRITON_INTERPRET", None)
    return env


class Server:
    def __init__(self, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
        self.port, self.process, self.log = port, process, log

    def request(self, path: str, body: Any = None, key: str | None = KEY) -> tuple[int, str]:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}")
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        if key:
            request.add_header("Authorization", f"Bearer {key}")
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()


@pytest.fixture(scope="module")
def server(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    port, log = _free_port(), tmp_path_factory.mktemp("server") / "log.txt"
    # vLLM's flags may stand before the model.
    argv = [*COMMAND, "--max-num-seqs", "8", model_path, "--attention-backend", "sink_window"]
    argv += ["--window-tokens", "128"]
    argv += ["--sink-tokens", "32", "--port", str(port), "--enforce-eager", "--api-key", KEY]
    argv += ["--max-model-len", "2048", "--kv-cache-memory-bytes", str(200 << 20)]
    with log.open("wb") as output:
        process = subprocess.Popen(argv, stdout=output, stderr=output, env=_environment())
    started = time.monotonic()
    while b"vllm-ext: ready on" not in log.read_bytes():
        if process.poll() is not None or time.monotonic() - started > 150:
            process.kill()
            pytest.fail(f"server did not start:\n{log.read_text()[-4000:]}")
        time.sleep(0.5)
    yield Server(port, process, log)
    process.terminate()
    process.wait(timeout=60)


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
    status, text = server.request("/metrics", key=None)
    assert status == 200
    lines = [line for line in text.splitlines() if line.startswith("vllm_ext:")]
    selected = next(line for line in lines if 'reason="selected"' in line)
    assert float(selected.split()[-1]) >= 7
    assert 'vllm_ext:activation_ratio{method="SINK_WINDOW"} 1.0' in lines


def test_the_api_key_is_enforced(server: Server, model_path: str) -> None:
    body = {"model": model_path, "prompt": "hello", "max_tokens": 1}
    assert server.request("/v1/completions", body, key=None)[0] == 401
    assert server.request("/v1/completions", body, key="wrong")[0] == 401


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


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        pytest.param(["--port", "PORT"], ["another --port"], id="second-server"),
        pytest.param(["--windw-tokens", "5"], ["--windw-tokens", "--window-tokens"], id="typo"),
        pytest.param(
            ["--attention-backend", "NOPE"], ["NOPE", "SINK_WINDOW"], id="unknown-backend"
        ),
        pytest.param(
            ["--attention-backend", "SINK_WINDOW", "--kv-cache-dtype", "fp8"],
            ["does not support", "fp8", "--no-strict"],
            id="fp8-kv",
        ),
        pytest.param(
            ["--attention-backend", "SINK_WINDOW", "--window-tokens", "48", "--block-size", "64"],
            ["window_tokens is 48", "block of 64"],
            id="window-below-a-block",
        ),
        pytest.param(
            ["--attention-backend", "TIDAL_DECODE", "--profile", "gone.json"],
            ["gone.json", "cannot be read"],
            id="missing-profile",
        ),
    ],
)
def test_mistakes_end_in_a_short_error(
    server: Server, model_path: str, flags: list[str], words: list[str]
) -> None:
    flags = [str(server.port) if flag == "PORT" else flag for flag in flags]
    if "--port" not in flags:
        flags = ["--port", str(_free_port()), *flags]
    done = subprocess.run(
        [*COMMAND, model_path, *flags],
        env=_environment() | {"VLLM_LOGGING_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    message = next(line for line in done.stderr.splitlines() if "error:" in line)
    for word in words:
        assert word in message
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) < 25
