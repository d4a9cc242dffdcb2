"""The pages hold together: links, anchors, the map, the methods table, the index of benchmarks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from attn_backends.methods import REGISTRY
from vllm_ext.cli.methods import MARKERS, markdown

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
BENCHMARKS = ROOT / "docs" / "benchmarks"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
README_LINES = 130
_FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^()\s]+)\)")


def _prose(page: Path) -> str:
    """The text without code, in which brackets are no links and ``#`` no heading."""
    return re.sub(r"`[^`\n]*`", "`code`", _FENCE.sub("", page.read_text()))


def _links(page: Path) -> Iterator[tuple[Path, str]]:
    """Target and anchor of every link that stays in the repository."""
    for link in _LINK.findall(_prose(page)):
        if ":" not in link:
            path, _, anchor = link.partition("#")
            yield ((page.parent / path).resolve() if path else page), anchor


def _anchors(page: Path) -> set[str]:
    """What GitHub makes of the page's headings; equal ones are numbered."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", _FENCE.sub("", page.read_text()), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        base = anchor = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        count = 0
        while anchor in found:
            count += 1
            anchor = f"{base}-{count}"
        found.add(anchor)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_resolves(page: Path) -> None:
    broken = [
        f"{target}#{anchor}"
        for target, anchor in _links(page)
        if not target.exists() or (anchor and anchor not in _anchors(target))
    ]
    assert not broken


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= README_LINES


def test_every_page_is_reachable_from_the_readme() -> None:
    """By two clicks: from README, or from a page that README links."""
    first = {target for target, _ in _links(README)} | {README}
    second = {target for page in first if page.suffix == ".md" for target, _ in _links(page)}
    assert not set(PAGES) - first - second


def test_the_methods_table_is_the_registrys() -> None:
    text = README.read_text()
    table = text.partition(MARKERS[0])[2].partition(MARKERS[1])[0].strip()
    assert all(f"`{name}`" in table for name in REGISTRY)
    assert table == markdown(), "run: .venv/bin/vllm-ext methods --write README.md"


def test_every_result_of_the_readme_has_its_file() -> None:
    section = README.read_text().partition("\n## Results\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    assert len(rows) == 6
    for row in rows:
        assert any(BENCHMARKS in (ROOT / link).parents for link in _LINK.findall(row)), row


def test_the_index_names_every_benchmark_once_and_no_other() -> None:
    index = BENCHMARKS / "README.md"
    named = [target for target, _ in _links(index) if target.parent == BENCHMARKS]
    there = {path for path in BENCHMARKS.iterdir() if path != index}
    assert sorted(there - {*named}) == [], "give them a line in docs/benchmarks/README.md"
    assert sorted({*named} - there) == [], "docs/benchmarks/README.md names files that are gone"
    assert len(named) == len({*named})


def test_links_and_anchors_are_found_where_they_are(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A `b`, c\n# Same\n# Same\n[x](other.md#part) `[y](code.md)` [z](https://a.b)\n"
        "[w](#same)\n```\n# no heading\n[v](fenced.md)\n```\n"
    )
    assert [*_links(page)] == [(tmp_path / "other.md", "part"), (page, "same")]
    assert _anchors(page) == {"a-b-c", "same", "same-1"}
