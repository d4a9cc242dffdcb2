"""A module in a process of its own, asked by JSON lines.

vLLM keeps process-wide state: two engines to compare, or one in an environment of its own, need
processes of their own. `Child` is the side that asks, `Parent` the side that answers.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vllm_ext.errors import UserError

_TAIL_LINES = 25


def quiet_environment(changes: Mapping[str, str | None]) -> dict[str, str]:
    """This process's environment for an engine: no chatter, nothing from the hub.

    Args:
        changes: win over both; None removes a variable.
    """
    quiet = {"VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1"}
    merged = {**os.environ, **quiet, **changes}
    return {key: value for key, value in merged.items() if value is not None}


class Child:
    """``python -m MODULE``, whose main program answers a `Parent`; a context manager.

    Args:
        name: for messages.
        module: absolute name.
        env: all of its environment.
        folder: where it runs; None is here.
    """

    def __init__(
        self, name: str, module: str, env: Mapping[str, str], folder: Path | None = None
    ) -> None:
        self._name = name
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (see close)
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=env,
            cwd=folder,
        )

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, request: Any, limit_s: float | None = None) -> Any:
        """Sends a request and waits for its answer, both of them any JSON value.

        Args:
            request: sent as one line.
            limit_s: after so many seconds the child is ended; None waits for ever.

        Raises:
            UserError: it ended; the message has the end of its log.
            TimeoutError: the limit was reached.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        is_late = threading.Event()

        def end() -> None:
            is_late.set()
            self._process.kill()

        timer = threading.Timer(limit_s, end) if limit_s is not None else None
        if timer:
            timer.start()
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            if timer:
                timer.cancel()
        if line:
            return json.loads(line)
        if is_late.is_set():
            raise TimeoutError(f"the {self._name} did not answer within {limit_s:g} s")
        raise UserError(f"the {self._name} ended; the end of its log:\n{self._log_tail()}")

    def _log_tail(self) -> str:
        self._log.seek(0)
        return "".join(self._log.readlines()[-_TAIL_LINES:])

    def close(self) -> None:
        """Tells it that nobody asks any more; one that stays for half a minute is killed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # what it did not read
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def kill(self) -> None:
        """Ends it in the middle of whatever it does."""
        self._process.kill()
        self.close()


class Parent:
    """The process that asks, as its `Child` sees it.

    From its making on, what this process and those it starts print goes to the log: answers are
    alone on the pipe. Therefore it comes first, before anything imports vLLM.
    """

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def __iter__(self) -> Iterator[Any]:
        """Requests until the parent closes; each must be answered."""
        for line in sys.stdin:
            yield json.loads(line)

    def answer(self, value: Any) -> None:
        """Sends the answer to the last request; NumPy's numbers are JSON's."""
        print(json.dumps(value, default=float), file=self._answers, flush=True)
