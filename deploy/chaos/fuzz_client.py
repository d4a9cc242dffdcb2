"""The sending half of ``fuzz``: what was sent, what came back, and whose fault it was."""

from __future__ import annotations

import argparse
import re
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import requests

from deploy.chaos.fuzz_options import MAX_TOGETHER, Burst, answer_of
from deploy.chaos.fuzz_requests import HostileRequest

KV_USE = "vllm:kv_cache_usage_perc"
HELD = "vllm_ext:kv_blocks_held"
OUR_FRAME = re.compile(r'File "[^"]*/((?:vllm_ext|attn_backends|kvcache)/[^"]+)", line (\d+)')
RAISED = re.compile(
    r"^(?:\(.*?\) )?(?:ERROR .*?\] )?([\w.]*(?:Error|Exception)\b.*)$", re.MULTILINE
)
# Refusals are meant to be 400s; a route that makes something else of them does so with vLLM's own.
REFUSED = re.compile(r"VLLMValidationError|Caught handled exception")
CUT_OFF = "cut off"  # an answer that began and did not end
HUNG_UP = "hung up"  # on purpose
# An error after the status is sent; the Anthropic routes give no code.
STREAMED_ERROR = re.compile(
    r'^data: \{(?:"type": ?"error", ?)?"error": ?\{(?:.*?"code": ?(\d+))?', re.MULTILINE
)
CANARY: dict[str, Any] = {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}


@dataclass(frozen=True)
class Answer:
    """What came back: an HTTP status, or words on why there is none; and the body."""

    status: str
    text: str = ""

    @property
    def code(self) -> str:
        """The status, or that of an error in a stream."""
        streamed = self.streamed_error
        return self.status if streamed is None else streamed[1] or "200"

    @property
    def shown(self) -> str:
        """For the table of statuses."""
        streamed = self.streamed_error
        return self.status if streamed is None else f"200, then {streamed[1] or 'error'}"

    @property
    def streamed_error(self) -> re.Match[str] | None:
        """An error event after a 200."""
        return STREAMED_ERROR.search(self.text) if self.status == "200" else None

    @property
    def is_complete(self) -> bool:
        """Whether it is an answer to the question."""
        return self.status == "200" and self.streamed_error is None


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
        self._models: list[str] = [args.model, *args.adapter]
        self._expected: dict[str, str] = {}
        self._canary_due = 0
        self._threads = ThreadPoolExecutor(MAX_TOGETHER)
        self.num_bursts = 0
        self.num_compared = 0
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
        """The fixed question, to every model; its answer must never change, and no answer ends
        the run.
        """
        self._canary_due = self.num_sent + self._args.canary_every
        for model in self._models if not self.lost else ():
            try:
                reply = self._session.post(
                    self._args.url + "/v1/completions",
                    json={**CANARY, "model": model},
                    headers=self.auth(),
                    timeout=60,
                )
            except requests.RequestException as error:
                self._lose(f"the canary got no answer: {error!r}")
                return
            if reply.status_code != 200:
                self._lose(f"the canary got {reply.status_code}: {reply.text[:300]}")
                return
            text = reply.json()["choices"][0]["text"]
            expected = self._expected.setdefault(model, text)
            if text != expected:
                self.failures.append(f"{model}: the canary answered {text!r}, not {expected!r}")

    def _lose(self, reason: str) -> None:
        self.lost = True
        self.failures.append(f"{reason}; the last requests: {self._last}")

    def send(self, request: HostileRequest) -> None:
        """One hostile request; every so often, and after a lost one, the canary."""
        self.send_together([request])

    def send_burst(self, burst: Burst) -> None:
        """A burst, and where it is to be compared, its first request alone before."""
        first = burst.requests[0]
        alone = self.send_together([first]) if burst.is_compared else []
        self.num_bursts += not self.stopped
        together = self.send_together(burst.requests)
        if not alone or not together or not (alone[0].is_complete and together[0].is_complete):
            return
        self.num_compared += 1
        answers = [answer_of(alone[0].text), answer_of(together[0].text)]
        if answers[0] != answers[1]:
            again = self._ask(first)
            others = [_shown(request) for request in burst.requests[1:]]
            self.failures.append(
                f"{first.path} {_shown(first)}: alone {answers[0]}, together {answers[1]}, "
                f"alone again {again.text[:300]}; beside {others}"
            )

    def send_together(self, together: Sequence[HostileRequest]) -> list[Answer]:
        """Requests at once; a 5xx among them is blamed on what they logged in all.

        Returns:
            The answers in order; none where the run is over.
        """
        if self.stopped:
            return []
        log_start = self._log_bytes()
        for request in together:
            self._last = [*self._last[-4:], f"{request.method} {request.path} {_shown(request)}"]
            self.kinds[request.kind] += 1
        answers = list(self._threads.map(self._ask, together))
        for request, answer in zip(together, answers, strict=True):
            self._judge(request, answer, len(together), log_start)
        is_lost = any(not answer.code.isdigit() for answer in answers)
        if self.num_sent >= self._canary_due or is_lost:
            self.ask_canary()
        return answers

    def _judge(
        self, request: HostileRequest, answer: Answer, num_together: int, log_start: int
    ) -> None:
        route = f"{request.method} {_route(request)}"
        self.statuses.setdefault(route, Counter())[answer.shown] += 1
        if answer.code.startswith("5") or answer.code == CUT_OFF:
            self._note_server_error(request, answer.code, answer.text, log_start, num_together)
        elif not answer.code.isdigit() and answer.code != HUNG_UP:
            self.failures.append(f"{route}: {answer.status}: {_shown(request)}")

    def _ask(self, request: HostileRequest) -> Answer:
        try:
            with self._session.request(
                request.method,
                self._args.url + request.path,
                data=request.body,
                headers={**request.headers, **self.auth()},
                timeout=request.hang_up_s or self._args.timeout_s,
                allow_redirects=False,
                stream=request.hang_up_s is not None,
            ) as reply:
                return _read(reply, request.hang_up_s)
        except requests.exceptions.ChunkedEncodingError as error:
            return Answer(CUT_OFF, str(error))
        except requests.RequestException as error:
            is_timeout = isinstance(error, requests.Timeout) or "timed out" in str(error)
            if is_timeout and request.hang_up_s is not None:
                return Answer(HUNG_UP)
            if is_timeout:
                return Answer(f"no answer in {self._args.timeout_s} s")
            return Answer(f"connection lost: {type(error).__name__}")

    def _note_server_error(
        self,
        request: HostileRequest,
        status: str,
        text: str,
        log_start: int,
        num_together: int = 1,
    ) -> None:
        time.sleep(0.2)  # the log line may follow the answer
        trace = self._log_since(log_start)
        raised = RAISED.findall(trace)
        if status == CUT_OFF and not raised:
            self.failures.append(f"{request.path}: cut off, nothing logged: {_shown(request)}")
        self.server_errors.append(
            {
                "status": status,
                "method": request.method,
                "path": request.path,
                "content_type": request.headers.get("Content-Type"),
                "body": _shown(request),
                "sent_together": num_together,
                "answer": text[:300],
                "ours": frames_of_ours(trace),
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
            return str(file.read().decode(errors="replace"))


def frames_of_ours(trace: str) -> list[str]:
    """Places in our code that a log's tracebacks went through, but for those of refusals.

    Args:
        trace: what the server logged; several requests may have been there together.
    """
    frames: list[tuple[str, str]] = []
    start = 0
    for raised in RAISED.finditer(trace):
        if not REFUSED.search(raised[1]):
            frames += OUR_FRAME.findall(trace, start, raised.end())
        start = raised.end()
    frames += OUR_FRAME.findall(trace, start)
    return [f"{path}:{line}" for path, line in frames]


def _read(reply: requests.Response, hang_up_s: float | None) -> Answer:
    """The answer, or as much of it as there is until the client hangs up."""
    if hang_up_s is None:
        return Answer(str(reply.status_code), reply.text)
    until = time.monotonic() + hang_up_s
    body = b""
    for piece in reply.iter_content(None):
        body += piece
        if time.monotonic() > until:
            return Answer(HUNG_UP)
    return Answer(str(reply.status_code), body.decode(errors="replace"))


def _route(request: HostileRequest) -> str:
    path = request.path.partition("?")[0]
    return re.sub(r"^/v1/responses/[^/]+", "/v1/responses/ID", path)[:60]


def _shown(request: HostileRequest) -> str:
    text = (request.body or b"").decode(errors="backslashreplace")
    return text if len(text) <= 2000 else f"{text[:500]}... ({len(text)} characters)"
