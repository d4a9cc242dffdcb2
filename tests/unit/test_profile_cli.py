"""``vllm-ext profile``: mistakes are one line; the real thing runs in calibration tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from attn_backends.budget import BudgetSelector
from attn_backends.budget_config import BudgetConfig
from attn_backends.method import Geometry
from attn_backends.plan import LayerRole, LayerSchedule
from tests.batches import anchor_state, step_rows
from vllm_ext.calibration.anchors import probed_budget
from vllm_ext.cli import main


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nowhere", "--output", "p.json"], ["nowhere", "config.json"]),
        (["MODEL", "--output", "p.json", "--anchors", "0"], ["--anchors", "at least 1"]),
        (["MODEL", "--output", "p.json", "--corpus", "gone.txt"], ["gone.txt"]),
        (
            ["MODEL", "--output", "p.json", "--context-tokens", "600"],
            ["--context-tokens", "512"],
        ),
        (["MODEL", "--output", "p.json", "--block-size", "0"], ["--block-size", "at least 1"]),
        (["MODEL", "--output", "p.json", "--budget-tokens", "64"], ["--budget-tokens", "96"]),
        (["MODEL", "--check", "gone.json"], ["gone.json", "cannot be read"]),
        (
            ["MODEL", "--output", "p.json", "--method", "quest"],
            ["--method", "tidal_decode, moa, flux"],
        ),
        (
            ["MODEL", "--method", "moa", "--output", "p.json", "--density", "1.5"],
            ["--density", "at most 1"],
        ),
        (
            ["MODEL", "--method", "moa", "--output", "p.json", "--context-tokens", "600"],
            ["--context-tokens", "at least 1024"],
        ),
        (["nowhere", "--method", "moa", "--output", "p.json"], ["nowhere", "config.json"]),
        (["MODEL", "--method", "moa", "--output", "OTHER"], ["--output", "is not valid"]),
        (
            ["MODEL", "--method", "flux", "--output", "p.json", "--share", "1"],
            ["--share", "below 1"],
        ),
        (["MODEL", "--method", "flux", "--output", "a b.json"], ["--output", "routers' file"]),
        (
            ["MODEL", "--method", "flux", "--output", "p.json", "--window-tokens", "4000"],
            ["--context-tokens", "at least 4320"],
        ),
        (
            ["MODEL", "--method", "flux", "--output", "p.json", "--prompts", "9"],
            ["--prompts", "15"],
        ),
    ],
)
def test_mistakes_are_one_line(
    argv: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "other.json").write_text("[]")
    places = {"MODEL": str(tmp_path), "OTHER": str(tmp_path / "other.json")}
    assert main(["profile", *(places.get(word, word) for word in argv)]) == 2
    message = capsys.readouterr().err
    assert len(message.strip().splitlines()) == 1
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("block_size", "blocks"),
    [(16, (32, 2, 4)), (32, (16, 1, 2)), (64, (8, 1, 1)), (256, (2, 1, 1))],
)
def test_it_probes_the_blocks_that_a_server_reads(
    block_size: int, blocks: tuple[int, int, int]
) -> None:
    found = probed_budget(512, block_size)
    assert (found.budget_blocks, found.sink_blocks, found.recent_blocks) == blocks
    geometry = Geometry(4, 2, 4, 64, block_size, 1, 8192)
    schedule = LayerSchedule.uniform(LayerRole.SELF, 4)
    served = BudgetSelector(BudgetConfig(), schedule, geometry, torch.device("cpu"))
    state = anchor_state(served.plan(step_rows([8000])))
    assert (state.budget_blocks.item(), state.sink_blocks, state.recent_blocks) == blocks


def test_half_a_budget_still_holds_sinks_and_recent_blocks() -> None:
    assert probed_budget(48, 32).budget_blocks == 3
