"""Policy files: plain values with line numbers, and what the command line makes of them."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from attn_backends.config import parse_config
from attn_backends.methods.tidal_decode import METHOD, AnchorSection, TidalConfig
from attn_backends.policy.composition import compose
from attn_backends.policy.model import PolicyError
from attn_backends.profile import SHIPPED, load_profile
from vllm_ext.cli import main
from vllm_ext.cli.policy_file import MAX_POLICY_BYTES, read_policy
from vllm_ext.cli.serve import _reason
from vllm_ext.errors import UserError

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "deploy" / "policies" / "example-rag.yaml"
GOOD = """\
# a comment
settings:
  budget_tokens: 512

layers:
  - layers: "24-29"
    role: window
    sink_tokens: 64
    window_tokens: 1024
  - layers: [2, 7]
    role: anchor
presets: {deep: {factor: 1.5}}
"""


def _written(folder: Path, text: str | bytes) -> str:
    path = folder / "policy.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_a_file_is_plain_data_with_lines(tmp_path: Path) -> None:
    policy = read_policy(_written(tmp_path, GOOD))
    assert json.loads(json.dumps(policy.content)) == policy.content
    assert policy.content["layers"][1] == {"layers": [2, 7], "role": "anchor"}
    assert policy.content["presets"] == {"deep": {"factor": 1.5}}
    assert policy.line_of(("settings", "budget_tokens")) == 3
    assert policy.line_of(("layers", 0)) == 6
    assert policy.line_of(("layers", 1, "role")) == 11
    assert policy.line_of(("layers", 1, "retention")) == 10  # not there: its entry
    assert policy.line_of(()) == 2


def test_json_is_read_as_it_is(tmp_path: Path) -> None:
    content = {"settings": {"strict": True, "budget_fraction": 0.5}, "layers": [], "x": None}
    assert read_policy(_written(tmp_path, json.dumps(content, indent=2))).content == content
    assert read_policy(json.dumps(content)).content == content


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", [": is empty", "docs/policy.md"]),
        ("a:\n  - b\n c: 1\n", [":3: not YAML"]),
        ("a: [1,\n", [":2: not YAML"]),
        ("a: 1\n---\nb: 1\n", [":2: not YAML"]),
        ("a: 1\n\na: 2\n", [":3: a is given twice"]),
        ("a:\n  b: &x [1]\n  c: *x\n", [":2: a.c is an alias; write it out"]),
        ("a: 1\nb: !!python/object/apply:os.system [ls]\n", [":2: b has the tag", "os.system"]),
        ("a: 1\nb: !!python/name:os.system\n", [":2: b is", "plain"]),
        ("a: !custom {}\n", [":1: a has the tag !custom"]),
        ("on: 1\n", [":1: the policy has the key 'on'", "in quotes"]),
        ("1: 1\n", ["has the key '1'"]),
        ("<<: {a: 1}\n", ["has the key '<<'"]),
        ("a: yes\n", [":1: a is 'yes'", "bool", "in quotes"]),
        ("a: 1:30\n", ["a is '1:30'", "plain number"]),
        ("a: 010\n", ["a is '010'"]),
        ("a: 0x10\n", ["a is '0x10'"]),
        ("a: 1_000\n", ["a is '1_000'"]),
        ("a: .inf\n", ["a is '.inf'"]),
        ("a: 2001-01-01\n", ["timestamp"]),
        (b"a: \xff\n", ["not UTF-8"]),
        ("a: \x00\n", ["not YAML"]),
        ("[" * 100_000, ["nested too deeply"]),
        ("a" * (MAX_POLICY_BYTES + 1), ["more than 1048576 bytes"]),
    ],
)
def test_what_is_not_plain_yaml_is_refused_with_its_line(
    text: str | bytes, words: list[str], tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        read_policy(_written(tmp_path, text))
    for word in words:
        assert word in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--sparse-config .*none.yaml cannot be read: No such"):
        read_policy(str(tmp_path / "none.yaml"))


BAD_ROLE = GOOD.replace("role: anchor", "role: foo")


@pytest.mark.parametrize(
    ("text", "argv", "words"),
    [
        (BAD_ROLE, [], ["policy.yaml:11: layers[1].role is 'foo'; choose one of dense, anchor"]),
        (
            GOOD.replace("budget_tokens", "budgt_tokens"),
            [],
            ["policy.yaml:3: settings.budgt_tokens is not known; did you mean budget_tokens?"],
        ),
        (
            GOOD.replace("[2, 7]", "29"),
            [],
            ["policy.yaml:10: layers[1].layers has layer 29, which layers[0] has too"],
        ),
        (
            GOOD,
            ["--budget-tokens", "256"],
            ["--budget-tokens 256 and settings.budget_tokens 512", "policy.yaml:3", "twice"],
        ),
        (
            GOOD,
            ["--additional-config", '{"vllm_ext": {"budget_tokens": 256}}'],
            ["vllm_ext.budget_tokens in --additional-config 256", "policy.yaml:3"],
        ),
        (
            GOOD,
            ["--additional-config", '{"vllm_ext": {"policy": {}}}'],
            ["policy is given twice: --sparse-config", "--additional-config"],
        ),
        (
            GOOD,
            ["--attention-backend", "SINK_WINDOW"],
            ["--sparse-config is given", "SINK_WINDOW, which takes no policy; use TIDAL_DECODE"],
        ),
        (GOOD, ["--attention-backend", "TRITON_ATTN"], ["TRITON_ATTN, which takes no policy"]),
        (GOOD, ["--attention-backend", ""], ["--attention-backend is not given; use TIDAL"]),
        ("[1]", [], ["policy.yaml:1: the policy must be an object of settings"]),
    ],
)
def test_serve_refuses_in_one_line(
    text: str, argv: list[str], words: list[str], tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "config.json").write_text("{}")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    backend = [] if "--attention-backend" in argv else ["--attention-backend", "tidal_decode"]
    policy = _written(tmp_path, text)
    base = ["serve", str(tmp_path), "--port", port, "--sparse-config", policy]
    assert main([*base, *backend, *argv]) == 2
    message = capsys.readouterr().err
    assert len(message.strip().splitlines()) == 1
    for word in words:
        assert word in message


def test_what_the_engine_finds_later_has_its_line_too(tmp_path: Path) -> None:
    policy = read_policy(_written(tmp_path, GOOD))
    cause = PolicyError(("layers", 0, "layers"), "has layer 29; this model has layers 0 to 9")
    wrapped: Any = SimpleNamespace(
        errors=lambda: [{"msg": "Value error, x", "ctx": {"error": cause}}]
    )
    expected = f"{policy.name}:6: layers[0].layers has layer 29; this model has layers 0 to 9"
    assert _reason(wrapped, policy) == _reason(cause, policy) == expected
    assert _reason(wrapped, None) == "x"
    assert _reason(ValueError("y"), policy) == "y"


def test_the_example_fits_the_demo_model() -> None:
    content = read_policy(str(EXAMPLE)).content
    config = parse_config(TidalConfig, {"policy": content}, METHOD.name)
    profile = load_profile(SHIPPED / "smollm2-135m-instruct.json")
    base = profile.section(METHOD.name, AnchorSection).schedule(profile.num_layers)
    composed = compose(config.policy, base, 32, 3)
    assert composed.unmapped_layers == ()
    assert set(composed.schedule.spans) == set(range(24, 30))
    kept = {layer: heads for layer, heads in base.head_maps.items() if layer < 24}
    assert composed.schedule.head_maps == kept
