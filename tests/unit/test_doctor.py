"""What ``vllm-ext doctor`` says of a GPU, told instead of found."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_ext.cli import doctor


def _engine(mode: str | None) -> Any:
    """As far as the graph mode is looked up in it."""
    support = SimpleNamespace(name="UNIFORM")
    builder = SimpleNamespace(get_cudagraph_support=lambda vllm_config, spec: support)
    backend = SimpleNamespace(get_builder_cls=lambda: builder)
    return SimpleNamespace(
        attention_config=SimpleNamespace(backend=SimpleNamespace(get_class=lambda: backend)),
        compilation_config=SimpleNamespace(
            cudagraph_mode=None if mode is None else SimpleNamespace(name=mode)
        ),
    )


@pytest.mark.parametrize(
    ("device_type", "mode", "is_well"),
    [
        ("cuda", "FULL_DECODE_ONLY", True),
        ("cuda", "FULL_AND_PIECEWISE", True),
        ("cuda", "PIECEWISE", False),
        ("cuda", "NONE", False),
        ("cpu", "NONE", True),
        ("cpu", None, True),
    ],
)
def test_a_gpu_that_does_not_replay_decode_steps_is_a_problem(
    device_type: str, mode: str | None, is_well: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    problems = doctor._report_graphs(_engine(mode), device_type)
    assert len(problems) == (0 if is_well else 1)
    assert is_well or f"graph mode is {mode}" in problems[0]
    assert f"{mode or 'NONE'}; our builder declares UNIFORM" in capsys.readouterr().out


def test_the_device_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    platform = SimpleNamespace(
        get_device_capability=lambda: SimpleNamespace(as_version_str=lambda: "9.0"),
        get_device_name=lambda: "NVIDIA H200",
        get_device_total_memory=lambda: 140 << 30,
    )
    doctor._report_device(platform)
    assert "NVIDIA H200, compute capability 9.0, 140 GiB" in capsys.readouterr().out


def test_a_gpu_is_tested_with_graphs_and_nothing_is_compiled() -> None:
    vllm_config = pytest.importorskip("vllm.config")
    options = doctor.ENGINE_OPTIONS["cuda"]["compilation_config"]
    compilation = vllm_config.CompilationConfig(**options)
    assert compilation.mode == vllm_config.CompilationMode.NONE
    assert compilation.cudagraph_mode == vllm_config.CUDAGraphMode.FULL_DECODE_ONLY
