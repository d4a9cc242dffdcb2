"""What users see of the command line; nothing here starts an engine."""

from __future__ import annotations

import argparse
import json
import re
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from attn_backends.adapter.speculation import speculative_arguments
from attn_backends.config import Between, rule_of, settings_of
from attn_backends.methods import REGISTRY, load_method
from vllm_ext import plugin
from vllm_ext.cli import COMMANDS, main
from vllm_ext.cli.flags import add_setting_flags, flag_of, merge_additional_config
from vllm_ext.cli.ready import Address, curl_line
from vllm_ext.cli.serve import check_model, check_port, speculative_flag
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
    args = SimpleNamespace(served_model_name=None, model="m", api_key=["secret"])
    line = curl_line(args, Address("127.0.0.1", 1, "", ""))
    assert "secret" not in line
    assert "$VLLM_API_KEY" in line
    assert "127.0.0.1:1/" in line
    body = line.split("-d ")[1].strip("'")
    assert json.loads(body)["model"] == "m"


def _help(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*argv, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_help_names_what_a_newcomer_needs_first(capsys: pytest.CaptureFixture[str]) -> None:
    text = _help([], capsys)
    listed = re.findall(r"^ {4}(\S+)", text, re.MULTILINE)
    assert listed == [*COMMANDS]
    first = re.findall(r"^  vllm-ext (\S+)", text, re.MULTILINE)
    assert first == listed[-len(COMMANDS) :][:4] == ["doctor", "demo-model", "methods", "serve"]


def _setting_groups(text: str) -> dict[str, list[str]]:
    """Flags of every group of settings, by the group's title."""
    groups: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("settings of "):
            flags = groups.setdefault(line.removeprefix("settings of ").rstrip(":"), [])
        elif (flag := re.match(r"  (--[a-z-]+)", line)) and groups:
            flags.append(flag[1])
    return groups


def test_serve_help_groups_settings_by_the_methods_that_have_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    groups = _setting_groups(_help(["serve"], capsys))
    first = next(iter(groups))
    assert first.startswith("all methods")
    assert groups[first] == ["--strict", "--kernel"]
    named: set[tuple[str, str]] = set()
    for title, flags in groups.items():
        methods = [*REGISTRY] if title == first else re.split(", | and ", title)
        named |= {(method, flag) for method in methods for flag in flags}
    assert named == {
        (method, flag_of(setting))
        for method in REGISTRY
        for setting in settings_of(load_method(method).config_cls)
    }
    flags = [flag for group in groups.values() for flag in group]
    assert len(flags) == len(set(flags))


def test_serve_help_has_defaults_and_ranges_and_no_file_names(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = re.sub(r"\s+", " ", _help(["serve"], capsys))
    options = text.partition("every flag of")[0]
    described = dict(re.findall(r"(--[a-z-]+)(?:, --no-[a-z]+)? (.*?)(?= --|$)", options))
    for method in REGISTRY:
        for name, setting in settings_of(load_method(method).config_cls).items():
            words = {"bool": "on", "str": setting.default or "empty"}
            limits = f"(default {words.get(str(setting.type), setting.default)}"
            if isinstance(rule := rule_of(setting), Between):
                limits += f", {rule.lowest} to {rule.highest})"
            assert limits in described[flag_of(name)], (method, name)
    assert not re.findall(r"[\w/]+\.(?:py|md|json|yaml|cpp)\b", text)


def test_other_vllm_minors_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "version", lambda name: "0.33.1")
    with pytest.raises(plugin.UnsupportedVersion, match=r"0\.32\.x, found 0\.33\.1"):
        plugin.require_supported_vllm()
    assert plugin.platform() is None  # vLLM then knows none of our names: fails closed


def test_the_extension_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugin.DISABLE_ENV, "1")
    assert plugin.platform() is None
    plugin.register()


def test_a_unix_socket_needs_no_port(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        taken = ["--port", str(server.getsockname()[1])]
        bad_setting = ["--window-tokens", "512"]
        for uds in (["--uds", "server.sock"], ["--uds=server.sock"]):
            assert main(["serve", str(tmp_path), *taken, *uds, *bad_setting]) == 2
            assert "window_tokens given" in capsys.readouterr().err
        assert main(["serve", str(tmp_path), *taken, *bad_setting]) == 2
        assert "cannot listen" in capsys.readouterr().err


def test_serve_tells_vllm_of_drafts_unless_the_user_does() -> None:
    settings = {"lossless_tokens": 4}
    flag, value = speculative_flag("models/one", "TIDAL_DECODE", settings, [])
    assert flag == "--speculative-config"
    assert json.loads(value) == speculative_arguments("models/one", 4)
    assert speculative_flag("models/one", "TIDAL_DECODE", {"budget_tokens": 256}, []) == []
    assert speculative_flag("models/one", "MOA", None, []) == []
    given = ["--speculative-config={}"]
    assert speculative_flag("models/one", "TIDAL_DECODE", settings, given) == []
    with pytest.raises(UserError, match="give it as the first word"):
        speculative_flag(None, "TIDAL_DECODE", settings, ["--model", "models/one"])
