"""Profiles: a header, a section for each method, files beside them; older files are read."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from attn_backends.checkpoint import fingerprint
from attn_backends.config import ConfigError
from attn_backends.method import Geometry, SparseMethod
from attn_backends.methods import REGISTRY, load_method
from attn_backends.methods.sink_window import METHOD as SINK_WINDOW
from attn_backends.methods.sink_window import WindowSection
from attn_backends.methods.tidal_decode import METHOD as TIDAL_DECODE
from attn_backends.methods.tidal_decode import AnchorSection, TidalConfig
from attn_backends.plan import LayerRole
from attn_backends.profile import SHIPPED, Profile, load_profile, require_fit, shipped_profile
from kvcache.retention import KeepAll
from kvcache.spans import Span, everything
from tests.batches import SIX_LAYERS

HEADER: dict[str, Any] = {
    "fingerprint": "0" * 64,
    "model": "tiny",
    "num_layers": 6,
    "num_kv_heads": 2,
    "calibration": {},
}
ANCHORS: dict[str, Any] = {"dense_layers": [0], "anchor_layers": [1, 4], "head_maps": {"2": [1, 0]}}
DENSE, ANCHOR, REUSE = LayerRole.DENSE, LayerRole.SELF, LayerRole.REUSE
DROP, WINDOW = LayerRole.DROP, LayerRole.WINDOW


def _written(folder: Path, methods: dict[str, Any], /, **changes: Any) -> Path:
    path = folder / "profile.json"
    path.write_text(json.dumps(HEADER | {"schema_version": 2, "methods": methods} | changes))
    return path


def _version_1(folder: Path, **changes: Any) -> Path:
    path = folder / "old.json"
    path.write_text(json.dumps(HEADER | {"schema_version": 1} | ANCHORS | changes))
    return path


def _roles(method: SparseMethod, path: Path) -> tuple[LayerRole, ...]:
    return method.schedule(method.config_cls(profile=str(path)), SIX_LAYERS).roles  # type: ignore[call-arg]


def _refusal(method: SparseMethod, path: Path) -> str:
    with pytest.raises(ConfigError) as error:
        _roles(method, path)
    message = str(error.value)
    assert len(message.splitlines()) == 1
    return message


def test_each_method_follows_its_own_section(tmp_path: Path) -> None:
    sections = {
        "TIDAL_DECODE": ANCHORS | {"drop_layers": [5]},
        "SINK_WINDOW": {"full_layers": [2], "drop_layers": [3]},
    }
    path = _written(tmp_path, sections)
    assert _roles(TIDAL_DECODE, path) == (DENSE, ANCHOR, REUSE, REUSE, ANCHOR, DROP)
    assert _roles(SINK_WINDOW, path) == (WINDOW, WINDOW, DENSE, DROP, WINDOW, WINDOW)


@pytest.mark.parametrize(
    ("method", "other", "command"),
    [
        (TIDAL_DECODE, {"SINK_WINDOW": {}}, "vllm-ext profile MODEL --output FILE"),
        (SINK_WINDOW, {"TIDAL_DECODE": ANCHORS}, "--drop N --window-instead"),
    ],
)
def test_a_profile_of_another_method_is_refused_with_the_command_that_makes_it(
    method: SparseMethod, other: dict[str, Any], command: str, tmp_path: Path
) -> None:
    message = _refusal(method, _written(tmp_path, other))
    assert f"has nothing for {method.name} (it has: {next(iter(other))})" in message
    assert message.endswith(command)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"anchor_layers": [1, 9]}, "anchor_layers has [9]; layers are 0 to 5"),
        ({"dense_layers": [0, 1]}, "both in dense_layers and in anchor_layers"),
        ({"drop_layers": [6]}, "drop_layers has [6]"),
        ({"drop_layers": [4]}, "both in anchor_layers and in drop_layers"),
        (
            {"dense_layers": [], "anchor_layers": [], "drop_layers": [0, 1, 2, 3, 4, 5]},
            "keep at least one",
        ),
        ({"anchor_layers": [3]}, "layers [1, 2] come before the first anchor"),
        ({"head_maps": {"6": [0, 0]}}, "head_maps has layer 6 of 6"),
        ({"head_maps": {"2": [0, 5]}}, "between 0 and 1"),
        ({"head_maps": {"2": [0]}}, "needs 2 heads"),
        ({"head_maps": {"2": 5}}, "methods.TIDAL_DECODE.head_maps.2"),
        ({"anchor_layers": None}, "methods.TIDAL_DECODE.anchor_layers"),
        ({"full_layers": []}, "methods.TIDAL_DECODE.full_layers: Extra"),
        ({"window_layers": []}, "methods.TIDAL_DECODE.window_layers: Extra"),
    ],
)
def test_a_bad_section_of_anchors_names_what_is_wrong(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = _written(tmp_path, {"TIDAL_DECODE": ANCHORS | changes})
    assert words in _refusal(TIDAL_DECODE, path)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"full_layers": [6]}, "full_layers has [6]"),
        ({"full_layers": [2], "drop_layers": [2]}, "both in full_layers and in drop_layers"),
        ({"full_layers": [2], "full_heads": {"2": [0]}}, "both in full_layers and in full_heads"),
        ({"drop_layers": [2], "full_heads": {"2": [0]}}, "both in full_heads and in drop_layers"),
        ({"full_heads": {"6": [0]}}, "full_heads has [6]"),
        ({"full_heads": {"2": [2]}}, "full_heads[2] is [2]; name some of its heads 0 to 1"),
        ({"full_heads": {"2": [-1]}}, "full_heads[2] is [-1]"),
        ({"full_heads": {"2": []}}, "full_heads[2] is []"),
        ({"full_heads": {"2": [0, 0]}}, "each once"),
        ({"full_heads": {"2": [0, 1]}}, "for all of them: full_layers"),
        ({"full_heads": [2]}, "methods.SINK_WINDOW.full_heads"),
        ({"drop_layers": [0, 1, 2, 3, 4, 5]}, "keep at least one"),
        ({"anchor_layers": [1]}, "methods.SINK_WINDOW.anchor_layers: Extra"),
    ],
)
def test_a_bad_section_of_windows_names_what_is_wrong(
    section: dict[str, Any], words: str, tmp_path: Path
) -> None:
    assert words in _refusal(SINK_WINDOW, _written(tmp_path, {"SINK_WINDOW": section}))


def test_full_heads_see_everything_and_the_others_the_window(tmp_path: Path) -> None:
    path = _written(tmp_path, {"SINK_WINDOW": {"full_heads": {"4": [1], "0": [0]}}})
    section = load_profile(path).section("SINK_WINDOW", WindowSection)
    assert section.full_heads == {4: [1], 0: [0]}
    config = SINK_WINDOW.config_cls(profile=str(path))
    schedule = SINK_WINDOW.schedule(config, SIX_LAYERS)
    window, full = Span(64, 1024), everything()
    assert schedule.spans[0] == (full, window)
    assert schedule.spans[4] == (window, full)
    assert schedule.spans[1] == (window, window)
    entries = SINK_WINDOW.entries(config, schedule, SIX_LAYERS)
    kept = [(one.layer, one.heads) for one in entries if one.policy == KeepAll()]
    assert kept == [(0, (0,)), (4, (1,))]
    keep_all = SINK_WINDOW.config_cls(profile=str(path), retention="keep_all")
    assert {one.heads for one in SINK_WINDOW.entries(keep_all, schedule, SIX_LAYERS)} == {None}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema_version": 3}, "schema_version"),
        ({"schema_version": None}, "schema_version"),
        ({"extra": 1}, "extra"),
        ({"fingerprint": "xyz"}, "fingerprint"),
        ({"num_layers": 0}, "num_layers"),
        ({"methods": {"tidal decode": {}}}, "methods"),
        ({"methods": {"TIDAL_DECODE": []}}, "methods.TIDAL_DECODE"),
        ({"window_layers": []}, "window_layers: Extra"),
        ({"files": {"../router.json": "0" * 64}}, "files"),
        ({"files": {"/etc/passwd": "0" * 64}}, "files"),
        ({"files": {"router.pt": "0" * 64}}, "files"),
        ({"files": {"router.pkl\n.json": "0" * 64}}, "files"),
        ({"files": {"router.json": "0"}}, "files.router.json"),
    ],
)
def test_a_bad_header_names_what_is_wrong(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    message = _refusal(TIDAL_DECODE, _written(tmp_path, {"TIDAL_DECODE": ANCHORS}, **changes))
    assert f"{tmp_path}/profile.json is not valid: {words}" in message


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"text"', "[" * 100_000])
def test_what_is_not_a_profile_at_all_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    assert "broken.json is not valid: the file: " in _refusal(TIDAL_DECODE, path)


def test_missing_large_and_foreign_profiles_are_refused(tmp_path: Path) -> None:
    assert "cannot be read" in _refusal(TIDAL_DECODE, tmp_path / "none.json")
    (tmp_path / "huge.json").write_text(" " * (5 << 20))
    assert "at most" in _refusal(TIDAL_DECODE, tmp_path / "huge.json")
    path = _written(tmp_path, {"TIDAL_DECODE": ANCHORS, "SINK_WINDOW": {}}, num_layers=8)
    for method in (TIDAL_DECODE, SINK_WINDOW):
        assert "this model has 6 of 2" in _refusal(method, path)


def test_a_file_of_version_1_serves_both_methods_as_it_did(tmp_path: Path) -> None:
    path = _version_1(tmp_path)
    schedule = TIDAL_DECODE.schedule(TidalConfig(profile=str(path)), SIX_LAYERS)
    assert schedule.roles == (DENSE, ANCHOR, REUSE, REUSE, ANCHOR, REUSE)
    assert schedule.head_maps == {2: (1, 0)}
    assert _roles(SINK_WINDOW, path) == (WINDOW,) * 6
    path = _version_1(tmp_path, drop_layers=[2], full_layers=[3])
    assert _roles(TIDAL_DECODE, path) == (DENSE, ANCHOR, DROP, REUSE, ANCHOR, REUSE)
    assert _roles(SINK_WINDOW, path) == (WINDOW, WINDOW, DROP, DENSE, WINDOW, WINDOW)
    assert load_profile(path).schema_version == 2


def test_window_layers_of_version_1_are_no_anchors_business(tmp_path: Path) -> None:
    path = _version_1(tmp_path, window_layers=[2], full_layers=[0, 1, 3, 4, 5])
    assert "has nothing for TIDAL_DECODE (it has: SINK_WINDOW)" in _refusal(TIDAL_DECODE, path)
    assert _roles(SINK_WINDOW, path) == (DENSE, DENSE, WINDOW, DENSE, DENSE, DENSE)
    assert _roles(TIDAL_DECODE, _version_1(tmp_path, window_layers=[]))[2] is REUSE


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"anchor_layers": [1, 9]}, "methods.TIDAL_DECODE: anchor_layers has [9]"),
        ({"head_maps": {"2": [0]}}, "needs 2 heads"),
        ({"window_layers": "2"}, "window_layers is '2'; it must be a list of layers"),
        ({"methods": {}}, "methods is not of schema_version 1"),
        ({"files": {}}, "files is not of schema_version 1"),
        ({"extra": 1}, "extra"),
    ],
)
def test_a_bad_file_of_version_1_names_what_is_wrong(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    assert words in _refusal(TIDAL_DECODE, _version_1(tmp_path, **changes))


def test_what_a_command_writes_is_what_methods_read(tmp_path: Path) -> None:
    old = load_profile(_version_1(tmp_path, drop_layers=[5], full_layers=[3]))
    schedule = old.section("TIDAL_DECODE", AnchorSection).schedule(6)
    made = (
        Profile(schema_version=2, **HEADER)
        .with_section("TIDAL_DECODE", AnchorSection.of(schedule))
        .with_section("SINK_WINDOW", WindowSection(full_layers=[3], drop_layers=[5]))
    )
    path = tmp_path / "new.json"
    path.write_text(made.model_dump_json())
    for method in (TIDAL_DECODE, SINK_WINDOW):
        assert _roles(method, path) == _roles(method, tmp_path / "old.json")
    assert load_profile(path).section("TIDAL_DECODE", AnchorSection).schedule(6) == schedule
    with pytest.raises(ValueError, match=r"full_layers has \[6\]"):
        made.with_section("SINK_WINDOW", WindowSection(full_layers=[6]))


def _with_file(folder: Path, content: bytes) -> Profile:
    (folder / "router.safetensors").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    return load_profile(_written(folder, {}, files={"router.safetensors": digest}))


def test_a_file_beside_a_profile_is_read_if_it_is_the_one_that_was_made(tmp_path: Path) -> None:
    profile = _with_file(tmp_path, b"weights")
    assert profile.read_file("router.safetensors") == b"weights"
    with pytest.raises(ConfigError, match=r"profile\.json names no file 'other\.json' beside it"):
        profile.read_file("other.json")
    (tmp_path / "router.safetensors").write_bytes(b"Weights")
    with pytest.raises(ConfigError, match=r"router\.safetensors is not the file that profile"):
        profile.read_file("router.safetensors")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("gone", "cannot be read: No such file"),
        ("fifo", "is not a regular file"),
        ("folder", "cannot be read: Is a directory"),
        ("link", "is a link out of the folder"),
        ("loop", "cannot be read: Too many levels"),
        ("huge", "has more than 67108864 bytes"),
    ],
)
def test_a_file_beside_a_profile_may_be_anything(kind: str, message: str, tmp_path: Path) -> None:
    profile = _with_file(tmp_path, b"weights")
    path = tmp_path / "router.safetensors"
    elsewhere = tmp_path / "elsewhere" / "router.safetensors"
    elsewhere.parent.mkdir()
    path.rename(elsewhere)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(elsewhere)
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "huge":
        with path.open("wb") as file:
            file.truncate(1 << 33)  # sparse
    with pytest.raises(ConfigError, match=message):
        profile.read_file("router.safetensors")


def test_fingerprints_tell_checkpoints_apart(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 2}')
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"a" * 100)
    first = fingerprint(tmp_path)
    assert first == fingerprint(tmp_path)
    weights.write_bytes(b"a" * 99 + b"b")
    assert fingerprint(tmp_path) != first
    assert shipped_profile(tmp_path) is None


def test_shipped_profiles_are_valid() -> None:
    paths = sorted(SHIPPED.glob("*.json"))
    assert paths, f"no profile in {SHIPPED}"
    profiles = [load_profile(path) for path in paths]
    assert len({profile.fingerprint for profile in profiles}) == len(paths)  # each can be found
    for profile, path in zip(profiles, paths, strict=True):
        assert json.loads(path.read_text())["schema_version"] == 2
        assert {*profile.methods} <= {*REGISTRY}
        for name in profile.methods:
            section_cls = load_method(name).profile_section
            assert section_cls is not None
            profile.section(name, section_cls)
        assert profile.section("TIDAL_DECODE", AnchorSection).anchor_layers


def test_shipped_profiles_say_the_same_in_version_1(tmp_path: Path) -> None:
    for path in SHIPPED.glob("*.json"):
        raw = json.loads(path.read_text())
        sections = raw.pop("methods")
        del raw["files"]
        flat = sections["SINK_WINDOW"] | sections["TIDAL_DECODE"]
        del flat["full_heads"]
        old = tmp_path / path.name
        old.write_text(json.dumps(raw | flat | {"schema_version": 1, "window_layers": []}))
        geometry = Geometry(raw["num_layers"], raw["num_kv_heads"], 9, 64, 32, 4, 8192)
        before, now = load_profile(old), load_profile(path)
        require_fit(before, geometry.num_layers, geometry.num_kv_heads)
        assert (before.findings, before.calibration) == (now.findings, now.calibration)
        for method in (TIDAL_DECODE, SINK_WINDOW):
            schedules = [
                method.schedule(method.config_cls(profile=str(file)), geometry)  # type: ignore[call-arg]
                for file in (old, path)
            ]
            assert schedules[0] == schedules[1]
