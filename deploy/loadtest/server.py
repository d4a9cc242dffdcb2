"""``vllm-ext serve`` as a child process, for load tests that start their own servers."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from deploy.loadtest.endpoint import fetch
from vllm_ext.bench.decode import STOCK
from vllm_ext.errors import UserError
from vllm_ext.methods import REGISTRY, own_settings
from vllm_ext.plugin import DISABLE_ENV

# `python -c`, not the installed script: the copy that is being worked on must be the one served.
_COMMAND = "import sys; from vllm_ext.cli import main; sys.exit(main(sys.argv[1:]))"


def serve_words(
    arm: str, model: str, port: int, server_args: str, settings: dict[str, Any]
) -> list[str]:
    """Words after ``vllm-ext`` that start an arm's server on 127.0.0.1.

    Args:
        arm: ``stock`` or a method's name.
        model: folder or hub name.
        port: to bind.
        server_args: more flags, as one shell-quoted string.
        settings: ours; those that the method does not know are not given to it.
    """
    words = ["serve", model, "--host", "127.0.0.1", "--port", str(port)]
    words += shlex.split(server_args)
    if arm != STOCK:
        words += ["--attention-backend", arm]
        for name, value in own_settings(arm, settings).items():
            flag = name.replace("_", "-")
            is_switch = isinstance(value, bool)
            words += (
                [f"--{'' if value else 'no-'}{flag}"] if is_switch else [f"--{flag}", str(value)]
            )
    return words


def check_arms(arms: list[str]) -> None:
    """Refuses arms that ``serve_words`` cannot start.

    Raises:
        UserError: an unknown name.
    """
    unknown = [name for name in arms if name not in (STOCK, *REGISTRY)]
    if unknown:
        raise UserError(
            f"--arms: unknown {', '.join(unknown)}; choose from {STOCK}, {', '.join(REGISTRY)}"
        )


class StartedServer:
    """A server of our own, up while the context lasts.

    Raises:
        UserError: on entering, when it does not come up; the message has the end of its log.
    """

    def __init__(self, arm: str, words: list[str], url: str, start_limit_s: float) -> None:
        self._arm, self._words, self._url = arm, words, url
        self._start_limit_s = start_limit_s
        self._log = tempfile.NamedTemporaryFile("w+", prefix="vllm-ext-serve-")  # noqa: SIM115

    def __enter__(self) -> StartedServer:
        env = dict(os.environ)
        env.pop(DISABLE_ENV, None)
        env.setdefault("HF_HUB_OFFLINE", "1")
        env |= {DISABLE_ENV: "1"} if self._arm == STOCK else {}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _COMMAND, *self._words],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,  # so that it can be ended with all its processes
        )
        try:
            self._wait_until_up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _wait_until_up(self) -> None:
        started = time.monotonic()
        while time.monotonic() - started < self._start_limit_s:
            if self._process.poll() is not None:
                raise UserError(f"the {self._arm} server ended; its log:\n{self._log_tail()}")
            try:
                fetch(f"{self._url}/health", timeout_s=2.0)
                return
            except UserError:
                time.sleep(0.5)
        raise UserError(
            f"the {self._arm} server was not up after {self._start_limit_s:.0f} s; "
            f"its log:\n{self._log_tail()}"
        )

    def _log_tail(self) -> str:
        lines = Path(self._log.name).read_text(errors="replace").splitlines()
        return "\n".join(lines[-25:])

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):  # then the group is killed below
            self._process.wait(timeout=60)
        with contextlib.suppress(ProcessLookupError):  # nothing of the group is left
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()
