"""The sending half of ``deploy.fuzz``: what was sent, what came back, and whose fault it was."""

from __future__ import annotations

import argparse
import re
import time
from collections import Counter
from typing import Any

import requests

from deploy.fuzz_requests import HostileRequest

KV_USE = "vllm:kv_cache_usage_perc"
HELD = "vllm_ext:kv_blocks_held"
OUR_FRAME = re.compile(r'File "[^"]*/((?:vllm_ext|attn_backends|kvcache)/[^"]+)", line (\d+)')
RAISED = re.compile(
    r"^(?:\(.*?\) )?(?:ERROR .*?\] )?([\w.]*(?:Error|Exception)\b.*)$", re.MULTILINE
)
CUT_OFF = "cut off"  # an answer that began and did not end
# An error after the status is sent; the Anthropic routes give no code.
STREAMED_ERROR = re.compile(
    r'^data: \{(?:"type": ?"error", ?)?"error": ?\{(?:.*?"code": ?(\d+))?', re.MULTILINE
)
CANARY = {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}


class Fuzzer:
    """Sends requests and keeps what matters about the answers."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._session = requests.Session()
        self._until = time.monotonic() + 60 * args.minutes
        self.statuses: dict[str, Counter[str]] = {}
        self.kinds: Counter[str] = Counter()
        self.server_errors: list[dict[str, Any]] = []
        self.failures: list[str] = []
        self._expected = ""
        self.lost = False
        self._last: list[str] = []

    @property
    def num_sent(self) -> int:
        """Hostile requests so far; canaries do not count."""
        return sum(self.kinds.values())

    @property
    def stopped(self) -> bool:
        """Whether ``--minutes`` are over or the server is lost."""
        return self.lost or time.monotonic() > self._until

    def ask_canary(self) -> None:
        """The fixed question; its answer must never change, and no answer ends the run."""
        body = {**CANARY, "model": self._args.model}
        try:
            reply = self._session.post(
                self._args.url + "/v1/completions", json=body, headers=self.auth(), timeout=60
            )
        except requests.RequestException as error:
            self._lose(f"the canary got no answer: {error!r}")
            return
        if reply.status_code != 200:
            self._lose(f"the canary got {reply.status_code}: {reply.text[:300]}")
            return
        text = reply.json()["choices"][0]["text"]
        self._expected = self._expected or text
        if text != self._expected:
            self.failures.append(f"the canary answered {text!r}, not {self._expected!r}")

    def _lose(self, reason: str) -> None:
        self.lost = True
        self.failures.append(f"{reason}; the last requests: {self._last}")

    def send(self, request: HostileRequest) -> None:
        """One hostile request; every so often, and after a lost one, the canary."""
        if self.stopped:
            return
        self._last = [*self._last[-4:], f"{request.method} {request.path} {_shown(request)}"]
        log_start = self._log_bytes()
        self.kinds[request.kind] += 1
        status, text = self._status_of(request)
        streamed = STREAMED_ERROR.search(text) if status == "200" else None
        shown_status = f"200, then {streamed[1] or 'error'}" if streamed else status
        route = f"{request.method} {_route(request)}"
        self.statuses.setdefault(route, Counter())[shown_status] += 1
        code = (streamed[1] or "200") if streamed else status
        if code.startswith("5") or code == CUT_OFF:
            self._note_server_error(request, code, text, log_start)
        elif not code.isdigit():
            self.failures.append(f"{route}: {status}: {_shown(request)}")
        if self.num_sent % self._args.canary_every == 0 or not code.isdigit():
            self.ask_canary()

    def _status_of(self, request: HostileRequest) -> tuple[str, str]:
        try:
            reply = self._session.request(
                request.method,
                self._args.url + request.path,
                data=request.body,
                headers={**request.headers, **self.auth()},
                timeout=self._args.timeout_s,
                allow_redirects=False,
            )
        except requests.Timeout:
            return f"no answer in {self._args.timeout_s} s", ""
        except requests.exceptions.ChunkedEncodingError as error:
            return CUT_OFF, str(error)
        except requests.RequestException as error:
            return f"connection lost: {type(error).__name__}", ""
        return str(reply.status_code), reply.text

    def _note_server_error(
        self, request: HostileRequest, status: str, text: str, log_start: int
    ) -> None:
        time.sleep(0.2)  # the log line may follow the answer
        trace = self._log_since(log_start)
        raised = RAISED.findall(trace)
        # A validation error of ours is meant to be a 400; a route that makes something else of it
        # does so with vLLM's own validation errors too.
        is_refusal = any("VLLMValidationError" in line for line in raised)
        frames = [] if is_refusal else OUR_FRAME.findall(trace)
        if status == CUT_OFF and not raised:
            self.failures.append(f"{request.path}: cut off, nothing logged: {_shown(request)}")
        self.server_errors.append(
            {
                "status": status,
                "method": request.method,
                "path": request.path,
                "content_type": request.headers.get("Content-Type"),
                "body": _shown(request),
                "answer": text[:300],
                "ours": [f"{path}:{line}" for path, line in frames],
                "raised": " -> ".join(dict.fromkeys(raised))[:300] or None,
            }
        )

    def figures(self) -> dict[str, float]:
        """The server's KV figures, summed over labels; empty where the server is lost."""
        for _ in range(2):  # steps write the gauges anew
            self.ask_canary()
            time.sleep(2)
        if self.lost:
            return {}
        totals: dict[str, float] = {}
        text = self._session.get(self._args.url + "/metrics", headers=self.auth(), timeout=30).text
        for line in text.splitlines():
            name = line.partition("{")[0].partition(" ")[0]
            if name in (KV_USE, HELD):
                totals[name] = totals.get(name, 0.0) + float(line.rpartition(" ")[2])
        return totals

    def auth(self) -> dict[str, str]:
        """The header that carries ``--api-key``, or nothing."""
        key = self._args.api_key
        return {"Authorization": f"Bearer {key}"} if key else {}

    def _log_bytes(self) -> int:
        return self._args.server_log.stat().st_size if self._args.server_log else 0

    def _log_since(self, start: int) -> str:
        if not self._args.server_log:
            return ""
        with self._args.server_log.open("rb") as file:
            file.seek(start)
            return file.read().decode(errors="replace")


def _route(request: HostileRequest) -> str:
    path = request.path.partition("?")[0]
    return re.sub(r"^/v1/responses/[^/]+", "/v1/responses/ID", path)[:60]


def _shown(request: HostileRequest) -> str:
    text = (request.body or b"").decode(errors="backslashreplace")
    return text if len(text) <= 2000 else f"{text[:500]}... ({len(text)} characters)"
