"""``vllm-ext profile``: mistakes are one line; the real thing runs in calibration tests."""

from __future__ import annotations

from pathlib import Path

import pytest

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
        (["MODEL", "--check", "gone.json"], ["gone.json", "cannot be read"]),
    ],
)
def test_mistakes_are_one_line(
    argv: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert main(["profile", *(str(tmp_path) if word == "MODEL" else word for word in argv)]) == 2
    message = capsys.readouterr().err
    assert len(message.strip().splitlines()) == 1
    for word in words:
        assert word in message
