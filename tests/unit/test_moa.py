"""MOA without an engine: classes of heads, published rules, its profile section and schedule."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from attn_backends.config import ConfigError, SettingError
from attn_backends.head_classes import MAX_CLASSES, covered_in_classes, padded_entries
from attn_backends.method import Geometry
from attn_backends.methods.moa import METHOD, HeadSpans, MoaConfig
from attn_backends.moa_rules import load_rules
from attn_backends.plan import LayerRole
from kvcache.retention import KeepAll, SpanRetention
from kvcache.spans import Span, covering, everything
from tests.moa_profile import write_profile

GEOMETRY = Geometry(4, 3, 9, 64, 32, 8, 8192)


def _section(**changed: Any) -> HeadSpans:
    """Full heads, plain windows and elastic ones: four of each in four layers of three heads."""
    values = {
        "sink_tokens": 64,
        "floor_tokens": 128,
        "classes": [[0, 64], [512, 0], [0, 16]],
        "class_of_head": [[0, 0, 0], [0, 1, 2], [1, 1, 2], [1, 2, 2]],
    }
    return HeadSpans.model_validate(values | changed)


def _profile(folder: Path, section: HeadSpans) -> str:
    path = folder / "moa.json"
    written = json.loads(Path(write_profile(path, 4, 3)).read_text())
    written["methods"]["MOA"] = section.model_dump()
    path.write_text(json.dumps(written))
    return str(path)


@pytest.mark.parametrize("seed", range(20))
def test_a_cover_shows_what_any_of_its_spans_shows(seed: int) -> None:
    source = random.Random(seed)
    spans = [
        Span(
            source.choice((0, 64)),
            source.choice((1, 128)),
            source.randrange(-1024, 2048),
            source.randrange(64),
        )
        for _ in range(4)
    ]
    cover = covering(spans, 4096)
    assert cover.sink_tokens == max(span.sink_tokens for span in spans)
    for num_tokens in range(1, 4097):
        assert cover.tokens(num_tokens) >= max(span.tokens(num_tokens) for span in spans)


def test_a_head_that_sees_everything_stays_full_as_generation_goes_on() -> None:
    assert Span(64, 128, 0, 64).hides_nothing
    assert not Span(64, 128, -65, 64).hides_nothing
    assert not Span(64, 128, 4096, 63).hides_nothing
    assert covering([Span(64, 128), Span(64, 128, -64, 64)], 1000) == everything()


@pytest.mark.parametrize("seed", range(5))
def test_covered_heads_are_in_few_classes_and_none_is_padded(seed: int) -> None:
    source = random.Random(seed)
    spans = [
        Span(64, 64, source.choice((-64, 448, 960)), source.choice((0, 8, 16, 32, 48, 64)))
        for _ in range(90)
    ]
    covered = covered_in_classes(spans, 8192)
    counts = Counter(covered)
    assert len(counts) <= MAX_CLASSES
    assert not padded_entries(list(counts.values()))
    for span, cover in zip(spans, covered, strict=True):
        assert all(cover.tokens(n) >= min(n, span.tokens(n)) for n in range(1, 8193, 61))


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"class_of_head": [[0, 0, 0]] * 4}, r"names the classes \[0\]; it must name each of 0"),
        ({"class_of_head": [[0, 1, 2]]}, r"class_of_head has 1 layers of \[3\] heads"),
        (
            {"class_of_head": [[0, 0, 0], [0, 0, 1], [1, 1, 1], [1, 2, 2]]},
            r"5, 5, 2 KV heads would be padded .* smallest \(2\) must divide",
        ),
        ({"classes": [[0, 64], [512, 0], [0, 65]]}, r"classes\[2\]: beta_64ths is 65"),
    ],
)
def test_a_section_that_does_not_fit_names_the_field(
    changed: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    config = MoaConfig(profile=_profile(tmp_path, _section(**changed)))
    with pytest.raises(ConfigError, match=problem):
        METHOD.schedule(config, GEOMETRY)


def test_heads_see_and_keep_what_the_profile_says(tmp_path: Path) -> None:
    config = MoaConfig(profile=_profile(tmp_path, _section()))
    schedule = METHOD.schedule(config, GEOMETRY)
    assert schedule.roles == (LayerRole.DENSE, *(LayerRole.WINDOW,) * 3)
    window, elastic = Span(64, 128, 512, 0), Span(64, 128, 0, 16)
    assert schedule.spans[1] == (everything(), window, elastic)
    kept = {
        (entry.layer, entry.heads): entry.policy
        for entry in METHOD.entries(config, schedule, GEOMETRY)
    }
    assert len(kept) == 12
    assert kept[0, (2,)] == KeepAll()
    assert kept[1, (0,)] == KeepAll()
    assert kept[3, (2,)] == SpanRetention(elastic)


def test_without_a_profile_it_says_how_to_make_one() -> None:
    with pytest.raises(ConfigError, match=r"no profile .*`vllm-ext profile MODEL --method moa"):
        METHOD.schedule(MoaConfig(), GEOMETRY)


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(SettingError, match=r"rules is 'a.json' beside a profile"):
        MoaConfig(profile="p.json", rules="a.json")


def _published(folder: Path, alphas: Any, betas: Any) -> Path:
    path = folder / "rules.json"
    path.write_text(json.dumps({"alphas": alphas, "betas": betas}))
    return path


def test_a_published_file_is_read(tmp_path: Path) -> None:
    """Sinks are inside MoA's span; a KV head keeps what any query head of its group sees."""
    alphas = [[0, 0, 1024, *[512] * 6]] * 4
    betas = [[1, 0.125, 0, *[0.25] * 6]] * 4
    rules = load_rules(_published(tmp_path, alphas, betas))
    heads = rules.query_head_spans()[0]
    assert heads[0] == everything()
    assert heads[1:3] == [Span(64, 64, -64, 8), Span(64, 64, 960, 0)]
    assert heads[2].sink_tokens + heads[2].tokens(8192) == 1024
    kv_heads = rules.kv_head_spans(3, 8192)[0]
    assert kv_heads[:2] == [everything(), Span(64, 64, 448, 16)]
    config = MoaConfig(rules=str(tmp_path / "rules.json"))
    schedule = METHOD.schedule(config, GEOMETRY)
    assert schedule.roles == (LayerRole.WINDOW,) * 4
    # Each query head sees what its own rule shows, whatever its KV head keeps.
    assert schedule.query_spans == {layer: tuple(heads) for layer in range(4)}
    assert schedule.spans[0][0] == everything()


def test_rules_that_query_heads_share_are_their_kv_head_s(tmp_path: Path) -> None:
    """Each launch then reads one rule per KV head; where all see everything, none."""
    betas = [[0.25] * 9, [1] * 9] * 2
    config = MoaConfig(rules=str(_published(tmp_path, [[0] * 9] * 4, betas)))
    schedule, window = METHOD.schedule(config, GEOMETRY), LayerRole.WINDOW
    assert schedule.roles == (window, LayerRole.DENSE) * 2
    assert not schedule.query_spans


@pytest.mark.parametrize(
    ("alphas", "betas", "problem"),
    [
        ([[0] * 9] * 4, [[2.0] * 9] * 4, "layer 0, query head 0: beta is 2.0; .* between 0 and 1"),
        ([[0] * 9] * 3, [[1] * 9] * 4, r"alphas has 3 layers of \[9\] query heads; this model"),
        ("x", [[1] * 9] * 4, "not in MoA's format, .*: alphas: Input should be a valid array"),
        ([[1e9] * 9] * 4, [[0] * 9] * 4, "alpha is 1000000000.0; it must be at most"),
    ],
)
def test_a_file_that_is_not_of_moa_is_refused(
    alphas: Any, betas: Any, problem: str, tmp_path: Path
) -> None:
    config = MoaConfig(rules=str(_published(tmp_path, alphas, betas)))
    with pytest.raises(ConfigError, match=problem):
        METHOD.schedule(config, GEOMETRY)
