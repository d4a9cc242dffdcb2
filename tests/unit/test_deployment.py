"""The service unit and the container file, as far as they can be read without running them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from vllm_ext.cli.serve import _own_parser

ROOT = Path(__file__).resolve().parents[2]
CONTAINER = ROOT / "deploy" / "container"
UNIT = (ROOT / "deploy" / "systemd" / "vllm-ext.service").read_text()


def _value(key: str) -> str:
    found = re.findall(rf"^{key}=(.*)$", UNIT, re.MULTILINE)
    assert len(found) == 1, key
    return str(found[0])


def test_the_service_comes_back_whatever_its_exit_code() -> None:
    assert _value("Restart") == "always"  # a dead engine ends the server with 0


def test_the_service_is_on_loopback_and_its_key_not_in_the_unit() -> None:
    program, command, _, *options = shlex.split(_value("ExecStart"))
    assert (Path(program).name, command) == ("vllm-ext", "serve")
    known, rest = _own_parser().parse_known_args(options)
    assert known.host == "127.0.0.1"
    assert not rest
    assert f"127.0.0.1:{known.port}/health" in _value("ExecStartPost")
    assert "VLLM_API_KEY" not in re.sub(r"^#.*$", "", UNIT, flags=re.MULTILINE)


@pytest.fixture
def path_with_stub(tmp_path: Path) -> str:
    """A ``vllm-ext`` that prints its words and whether it has a key."""
    stub = tmp_path / "vllm-ext"
    stub.write_text('#!/bin/sh\necho "$@" "key=${VLLM_API_KEY:-none}"\n')
    stub.chmod(0o755)
    return f"{tmp_path}{os.pathsep}{os.environ['PATH']}"


def _serve(path: str, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    script = str(CONTAINER / "serve.sh")
    return subprocess.run(
        ["sh", script, *words], env={"PATH": path, **env}, capture_output=True, text=True
    )


def test_the_container_does_not_listen_without_a_key(path_with_stub: str) -> None:
    for env in ({}, {"VLLM_API_KEY": ""}):
        done = _serve(path_with_stub, "MODEL", **env)
        assert done.returncode == 2
        assert "VLLM_API_KEY" in done.stderr
        assert not done.stdout


def test_the_container_binds_its_port_whatever_else_is_asked(path_with_stub: str) -> None:
    done = _serve(path_with_stub, "MODEL", "--port", "1", "--host", "::", VLLM_API_KEY="k")
    assert done.stdout == "serve MODEL --port 1 --host :: --host 0.0.0.0 --port 8000 key=k\n"
    options = shlex.split(done.stdout)[2:-1]
    known, _ = _own_parser().parse_known_args(options)
    assert (known.host, known.port) == ("0.0.0.0", 8000)
    assert _serve(path_with_stub, "--help").stdout == "serve --help key=none\n"


def test_the_image_copies_what_there_is_and_is_not_roots() -> None:
    lines = (CONTAINER / "Containerfile").read_text().splitlines()
    sources = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert sources
    assert all((ROOT / source).exists() for source in sources)
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users
    assert "root" not in users
    assert not [line for line in lines if "API_KEY" in line and line.startswith(("ENV", "ARG"))]
