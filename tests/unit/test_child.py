"""A module in a process of its own: answers, prints, ends and limits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_ext.child import Child, quiet_environment
from vllm_ext.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
TOY = """
import os, subprocess, sys, time
from vllm_ext.child import Parent
parent = Parent()
for request in parent:
    if request == "end":
        raise SystemExit("no such engine")
    if request == "wait":
        time.sleep(60)
    print("not an answer", flush=True)
    subprocess.run([sys.executable, "-c", "print('neither is this')"], check=True)
    parent.answer({"asked": request})
"""


@pytest.fixture
def toy(tmp_path: Path) -> Iterator[Child]:
    (tmp_path / "toy.py").write_text(TOY)
    env = quiet_environment({"PYTHONPATH": str(ROOT)})
    with Child("toy", "toy", env, tmp_path) as child:
        yield child


def test_answers_are_apart_from_what_is_printed(toy: Child) -> None:
    assert toy.ask([1, "two"]) == {"asked": [1, "two"]}
    many = list(range(100_000))  # more than a pipe holds
    assert toy.ask(many) == {"asked": many}


def test_one_that_ends_is_an_error_with_its_log(toy: Child) -> None:
    assert toy.ask(1) == {"asked": 1}
    with pytest.raises(UserError, match=r"(?s)the toy ended.*neither is this\nno such engine"):
        toy.ask("end")
    with pytest.raises(UserError, match="the toy ended"):
        toy.ask(list(range(100_000)))  # nobody reads it


def test_one_that_takes_too_long_is_ended(toy: Child) -> None:
    assert toy.ask(1, limit_s=60) == {"asked": 1}
    with pytest.raises(TimeoutError, match=r"the toy did not answer within 0\.5 s"):
        toy.ask("wait", limit_s=0.5)


def test_one_that_is_busy_can_be_killed(tmp_path: Path) -> None:
    (tmp_path / "busy.py").write_text("import time; time.sleep(60)")
    child = Child("busy", "busy", dict(os.environ), tmp_path)
    child.kill()


def test_changes_of_the_environment_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_EXT_DISABLE", "1")
    monkeypatch.setenv("KEPT", "yes")
    env = quiet_environment({"VLLM_EXT_DISABLE": None, "VLLM_LOGGING_LEVEL": "INFO"})
    assert "VLLM_EXT_DISABLE" not in env
    assert (env["KEPT"], env["HF_HUB_OFFLINE"], env["VLLM_LOGGING_LEVEL"]) == ("yes", "1", "INFO")
