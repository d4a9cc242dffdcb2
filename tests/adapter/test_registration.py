"""Plugin behaviour in fresh processes, as vLLM loads it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.e2e

SCRIPT = """
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm_ext import plugin
name = type(current_platform).__name__
path = plugin.platform()
assert plugin.platform() == path  # re-entrant
plugin.register(); plugin.register()
print(name, "SINK_WINDOW" in AttentionBackendEnum.__members__, path)
if path:
    backend = AttentionBackendEnum["SINK_WINDOW"].get_class()
    assert backend.get_name() == "SINK_WINDOW"
    assert AttentionBackendEnum["SPARSE_FULL"].get_class().get_name() == "SPARSE_FULL"
    assert backend is not AttentionBackendEnum["SPARSE_FULL"].get_class()
"""


def _run(env: dict[str, str]) -> str:
    full_env = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"} | env
    full_env.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=full_env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-1]


def test_names_are_registered_and_the_platform_is_ours() -> None:
    assert _run({}) == "ExtCpuPlatform True vllm_ext.platforms.cpu.ExtCpuPlatform"


def test_switched_off_leaves_vllm_as_it_is() -> None:
    assert _run({"VLLM_EXT_DISABLE": "1"}) == "CpuPlatform False None"
