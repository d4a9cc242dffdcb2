"""``vllm-ext bench decode`` of a shape without weights, from the command to its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_ext.cli import main

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_a_shape_is_timed_by_all_arms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--shape", "demo", "--layers", "2", "--cells", "2x256", "--rounds", "1"]
    words += ["--arms", "stock,TIDAL_DECODE", "--anchor-layers", "1", "--budget-tokens", "128"]
    words += ["--ttft", "--enforce-eager", "--output", str(tmp_path / "decode")]
    assert main(["bench", "decode", *words]) == 0
    cell = json.loads((tmp_path / "decode.json").read_text())["cells"][0]
    assert [*cell["arms"]] == ["stock", "TIDAL_DECODE"]
    for arm in cell["arms"].values():
        assert arm["tpot_ms_median"] > 0
        assert arm["ttft_ms_median"] > arm["tpot_ms_median"]
    assert (tmp_path / "decode.md").read_text() in capsys.readouterr().out
