"""A server as users start it, for the tests that talk to one."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

KEY = "test-key"
COMMAND = [str(Path(sys.executable).with_name("vllm-ext")), "serve"]
READY = b"vllm-ext: ready on"
START_TIMEOUT_S = 150


def free_port() -> int:
    """A port on loopback that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment() -> dict[str, str]:
    """The environment of a server under test."""
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    env.pop("TRITON_INTERPRET", None)
    return env


class Server:
    """A running server.

    Attributes:
        port: on loopback.
        process: the API process.
        log: its output.
    """

    def __init__(self, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
        self.port, self.process, self.log = port, process, log

    def request(
        self,
        path: str,
        body: Any = None,
        key: str | None = KEY,
        method: str | None = None,
        timeout_s: float = 120,
    ) -> tuple[int, str]:
        """Status and text of one answer; bytes are sent as they are, the rest as JSON."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", method=method)
        if body is not None:
            request.data = body if isinstance(body, bytes) else json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        if key:
            request.add_header("Authorization", f"Bearer {key}")
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def figure(self, name: str) -> float:
        """A figure of /metrics, summed over its labels; 0 where it is missing."""
        _, text = self.request("/metrics")
        return sum(
            float(line.rpartition(" ")[2])
            for line in text.splitlines()
            if line.partition("{")[0].partition(" ")[0] == name
        )

    def family(self) -> list[psutil.Process]:
        """The API process and all its children, the engine among them."""
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]


@contextlib.contextmanager
def running_server(
    model_path: str, log: Path, *flags: str, command: Sequence[str] = COMMAND
) -> Iterator[Server]:
    """Starts a server with the key ``KEY`` on a free port, and stops it with its children."""
    port = free_port()
    argv = [*command, "--max-num-seqs", "8", model_path, "--port", str(port), "--api-key", KEY]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*argv, "--enforce-eager", *flags], stdout=output, stderr=output, env=environment()
        )
    server = Server(port, process, log)
    family: list[psutil.Process] = []
    try:
        started = time.monotonic()
        while READY not in log.read_bytes():
            if process.poll() is not None or time.monotonic() - started > START_TIMEOUT_S:
                pytest.fail(f"server did not start:\n{log.read_text()[-4000:]}")
            time.sleep(0.5)
        family = server.family()
        yield server
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
        for child in family[1:]:  # a test may have killed their parent
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
