"""What users see of the command line; nothing here starts an engine."""

from __future__ import annotations

import argparse
import json
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from attn_backends.methods import REGISTRY
from vllm_ext import plugin
from vllm_ext.cli import main
from vllm_ext.cli.flags import add_setting_flags, merge_additional_config
from vllm_ext.cli.ready import curl_line
from vllm_ext.cli.serve import check_model, check_port
from vllm_ext.errors import UserError


def test_methods_table_has_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in REGISTRY)
    assert "reads" in table
    assert "frees" in table
    assert max(map(len, table.splitlines())) <= 92


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["serve"], ["no model", "demo-model"]),
        (["serve", "models/nope"], ["models/nope", "does not exist", "demo-model"]),
        (["serve", "/tmp"], ["config.json"]),
        (["serve", "MODEL", "--port", "99999999"], ["--port", "65535"]),
        (
            ["serve", "MODEL", "--window-tokens", "512"],
            ["window_tokens", "not given", "SINK_WINDOW"],
        ),
        (
            ["serve", "MODEL", "--attention-backend", "sink_window", "--window-tokens", "-5"],
            ["window_tokens", "-5"],
        ),
        (
            ["serve", "MODEL", "--attention-backend", "SPARSE_FULL", "--window-tokens", "64"],
            ["window_tokens", "SPARSE_FULL"],
        ),
        (["serve", "MODEL", "--additional-config", "{"], ["--additional-config", "JSON"]),
        (["doctor", "--attention-backend", "NOPE"], ["NOPE", "SINK_WINDOW"]),
        (["bench", "decode", "--arms", "stock,NOPE"], ["NOPE", "SINK_WINDOW"]),
        (["bench", "decode", "--arms", "stock,stock"], ["twice"]),
        (["bench", "decode", "--arms", "stock:kernel=cpu"], ["kernel=cpu", "stock", "none"]),
        (
            ["bench", "decode", "--arms", "TIDAL_DECODE:budget=5"],
            ["budget=5", "budget_tokens", "TIDAL_DECODE:"],
        ),
        (
            ["bench", "decode", "--arms", "TIDAL_DECODE:budget_tokens=many"],
            ["budget_tokens", "many", "int"],
        ),
        (["bench", "decode", "--batch", "0", "--model", "MODEL"], ["--batch"]),
        (
            ["bench", "capacity", "--model", "MODEL"],
            ["--context-tokens 7900", "2048"],
        ),
        (["eval", "MODEL", "--passkey", "5,4"], ["--passkey", "[5, 4]", "3 lengths"]),
        (["eval", "MODEL", "--lengths", "1024", "--multi-key", "-1"], ["--multi-key", "[-1]"]),
    ],
)
def test_user_errors_are_one_line_and_exit_2(
    argv: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 2048}')
    argv = [str(tmp_path) if word == "MODEL" else word for word in argv]
    if argv[0] == "serve" and "--port" not in argv:
        argv += ["--port", str(_free_port())]
    assert main(argv) == 2
    message = capsys.readouterr().err
    assert len(message.strip().splitlines()) == 1
    for word in words:
        assert word in message


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_taken_port_is_named_with_another_to_use() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        with pytest.raises(UserError, match=f"127.0.0.1:{port}.*another --port"):
            check_port("127.0.0.1", port)


def test_hub_names_pass_the_model_check() -> None:
    check_model("meta-llama/Llama-3.1-8B-Instruct")


def test_flags_merge_into_additional_config() -> None:
    parser = argparse.ArgumentParser()
    add_setting_flags(parser)
    args = vars(parser.parse_args(["--window-tokens", "512", "--no-strict"]))
    merged = merge_additional_config('{"other": 1, "vllm_ext": {"sink_tokens": 8}}', args)
    assert merged == {
        "other": 1,
        "vllm_ext": {"sink_tokens": 8, "window_tokens": 512, "strict": False},
    }
    with pytest.raises(UserError, match="given twice"):
        merge_additional_config('{"vllm_ext": {"window_tokens": 1}}', {"window_tokens": 2})


def test_curl_line_never_shows_the_api_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    args = SimpleNamespace(
        served_model_name=None, model="m", api_key=["secret"], host="0.0.0.0", port=1
    )
    line = curl_line(args)
    assert "secret" not in line
    assert "$VLLM_API_KEY" in line
    assert "127.0.0.1:1/" in line
    body = line.split("-d ")[1].strip("'")
    assert json.loads(body)["model"] == "m"


def test_other_vllm_minors_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "version", lambda name: "0.33.1")
    with pytest.raises(plugin.UnsupportedVersion, match=r"0\.32\.x, found 0\.33\.1"):
        plugin.require_supported_vllm()
    assert plugin.platform() is None  # vLLM then knows none of our names: fails closed


def test_the_extension_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugin.DISABLE_ENV, "1")
    assert plugin.platform() is None
    plugin.register()
