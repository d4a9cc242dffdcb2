"""The load test with vLLM's real client, against a server that fails in known ways."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from deploy.loadtest.__main__ import main

pytestmark = [pytest.mark.e2e, pytest.mark.slow]  # importing vLLM's client takes its time

KEY = "test-key"
TOKEN = b'data: {"choices":[{"text":" a"}]}\n\n'
END = (
    b'data: {"choices":[],"usage":{"completion_tokens":%d,"prompt_tokens":100}}\n\ndata: [DONE]\n\n'
)


def _handler(model_path: str) -> type[BaseHTTPRequestHandler]:
    numbers = itertools.count()  # 0 is the warm-up

    class Handler(BaseHTTPRequestHandler):
        """Of three completions one fails, one ends early, one is right."""

        def log_message(self, *_: Any) -> None:
            pass

        def _send(self, status: int, *parts: bytes) -> None:
            self.send_response(status)
            self.end_headers()
            for part in parts:
                self.wfile.write(part)

        def do_GET(self) -> None:
            models = json.dumps({"data": [{"id": "m", "root": model_path}]})
            figures = "# TYPE vllm:kv_cache_usage_perc gauge\nvllm:kv_cache_usage_perc 0.5\n"
            pages = {"/v1/models": models, "/metrics": figures}
            self._send(200 if self.path in pages else 404, pages.get(self.path, "").encode())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.headers.get("Authorization") != f"Bearer {KEY}":
                self._send(401)
                return
            asked = body["max_tokens"]
            match next(numbers) % 3:
                case 1:
                    self._send(500)
                case 2:
                    self._send(200, TOKEN * 2)  # as when a replica dies: no error, no [DONE]
                case _:
                    self._send(200, TOKEN * asked, END % asked)

    return Handler


@pytest.fixture
def url(model_path: str) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(model_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_errors_are_counted_and_finished_cells_are_kept(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--url", url, "--workloads", "distinct", "--lengths", "100", "--outputs", "8"]
    words += ["--concurrency", "2", "--requests-per-client", "3", "--slo-ttft-ms", "1000"]
    words += ["--output", str(tmp_path / "run")]
    monkeypatch.setenv("VLLM_API_KEY", "wrong")
    assert main(words) == 1
    assert "failed the warm-up request: Unauthorized" in capsys.readouterr().out
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    assert main(words) == 1  # something went wrong, and that is not hidden
    (cell,) = json.loads((tmp_path / "run.json").read_text())["cells"]
    assert (cell["completed"], cell["failed"], cell["cut_short"]) == (4, 2, 2)
    assert cell["errors"] == {"Internal Server Error": 2}
    assert cell["latency_ms"]["ttft"]["p99"] > 0
    assert cell["server"]["peak_kv_use"] in (None, 0.5)  # it may be over before a reading
    assert "4 of 6" in (tmp_path / "run.md").read_text()
    capsys.readouterr()
    assert main(words) == 1
    assert "1 cells are finished already" in capsys.readouterr().out
