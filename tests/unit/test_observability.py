"""Every metric that the dashboard asks for is exported by us or by vLLM."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.observability.preview import legend, with_gaps
from deploy.observability.queries import metric_names, panels

ROOT = Path(__file__).resolve().parents[2]
SUFFIXES = {
    "counter": ("_total",),
    "gauge": ("",),
    "histogram": ("_bucket", "_sum", "_count"),
}
KINDS = {  # what writes a metric of ours: kvcache/adapter/figures.py, and prometheus_client's own
    "add_to_counter": "counter",
    "set_gauge": "gauge",
    "set_part": "gauge",
    "add_to_histogram": "histogram",
    "GaugeMetricFamily": "gauge",
}


def _our_metrics() -> dict[str, str]:
    """Kind of every metric of ours by name, from the source: of each constant
    ``NAME = "vllm_ext:..."`` or ``NAME = ("vllm_ext:...", help)`` and the call it is given to.
    """
    named, kinds = set(), set()
    for package in ("kvcache", "attn_backends", "vllm_ext"):
        for path in sorted((ROOT / package).rglob("*.py")):
            tree = ast.parse(path.read_text())
            constants = dict(_metric_constants(tree))
            named |= set(constants.values())
            kinds |= {(constants[name], kind) for name, kind in _writes(tree) if name in constants}
    assert {base for base, _ in kinds} == named, "a metric that nothing writes"
    assert len(kinds) == len(named), "a metric of two kinds"
    return dict(kinds)


def _metric_constants(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in tree.body:
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
            continue
        value = node.value.elts[0] if isinstance(node.value, ast.Tuple) else node.value
        if isinstance(value, ast.Constant) and str(value.value).startswith("vllm_ext:"):
            yield node.targets[0].id, str(value.value)


def _writes(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Name that a metric is written by, and its kind."""
    for node in ast.walk(tree):
        if isinstance(node, ast.For):  # over several metrics
            bound, given = _names(node.target), _names(node.iter)
            for name, kind in (found for part in node.body for found in _writes(part)):
                yield from ((metric, kind) for metric in given if name in bound)
        if isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else _name(node.func)
            first = node.args[0]
            first = first.value if isinstance(first, ast.Starred) else first
            if called in KINDS:
                yield _name(first), KINDS[called]


def _name(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else ""


def _names(node: ast.AST) -> set[str]:
    return {_name(part) for part in ast.walk(node)} - {""}


def _exported_by_vllm() -> set[str]:
    """Sample names of vLLM's own collectors, read from its source: importing it takes seconds."""
    found = importlib.util.find_spec("vllm")
    assert found is not None
    assert found.origin is not None
    folder = Path(found.origin).with_name("v1")
    drafts = ast.walk(ast.parse((folder / "spec_decode" / "metrics.py").read_text()))
    texts = [str(node.value) for node in drafts if isinstance(node, ast.Constant)]
    names = {f"{text}_total" for text in texts if re.fullmatch(r"vllm:\w+", text)}  # counters alone
    for node in ast.walk(ast.parse((folder / "metrics" / "loggers.py").read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        kind = node.func.attr.removeprefix("_").removesuffix("_cls")
        for keyword in node.keywords:
            value = keyword.value
            if keyword.arg == "name" and isinstance(value, ast.Constant) and kind in SUFFIXES:
                names |= {f"{value.value}{suffix}" for suffix in SUFFIXES[kind]}
    return names


QUERIES = [
    pytest.param(query.expr, id=f"{panel.title}-{query.legend}")
    for panel in panels()
    for query in panel.queries
]


@pytest.fixture(scope="module")
def exported() -> set[str]:
    """All sample names that a server's /metrics can have."""
    ours = {base + suffix for base, kind in _our_metrics().items() for suffix in SUFFIXES[kind]}
    vllm = _exported_by_vllm()
    assert "vllm_ext:decode_rows_total" in ours
    assert "vllm_ext:kv_blocks_held" in ours
    assert "vllm_ext:kv_blocks_held_total" not in ours  # a gauge
    assert "vllm_ext:audit_kl_sum_bucket" not in ours  # a counter
    assert "vllm_ext:selection_recall_hist_count" in ours
    assert len(vllm) > 50
    return ours | vllm


@pytest.mark.parametrize("expr", QUERIES)
def test_every_metric_of_the_dashboard_is_exported(expr: str, exported: set[str]) -> None:
    names = metric_names(expr)
    assert names
    assert names <= exported


def test_every_metric_of_ours_is_on_the_dashboard() -> None:
    shown = {name for panel in panels() for q in panel.queries for name in metric_names(q.expr)}
    metrics = _our_metrics()
    del metrics["vllm_ext:activation_ratio"]  # its panel divides the counters, over all servers
    for base, kind in metrics.items():
        assert {base + suffix for suffix in SUFFIXES[kind]} & shown, f"no panel shows {base}"


@pytest.mark.parametrize(
    ("expr", "names"),
    [
        ('sum by (le, path) (rate(a:b_bucket{x="by_label"}[5m]))', {"a:b_bucket"}),
        ("histogram_quantile(0.95, sum(rate(c_total[$__rate_interval]))) / d", {"c_total", "d"}),
        ("e and on (f) g > bool 2.5", {"e", "g"}),
        ("1e3 * h", {"h"}),
    ],
)
def test_metric_names_of_promql(expr: str, names: set[str]) -> None:
    assert metric_names(expr) == names


def test_rays_names_become_the_servers_own() -> None:
    text = (ROOT / "deploy" / "observability" / "prometheus.yml").read_text()
    jobs: dict[str, Any] = {job["job_name"]: job for job in yaml.safe_load(text)["scrape_configs"]}

    def relabel(name: str) -> str:
        for rule in jobs["ray"]["metric_relabel_configs"]:
            assert rule["source_labels"] == [rule["target_label"]] == ["__name__"]
            if found := re.fullmatch(rule["regex"], name):
                name = rule["replacement"].replace("$1", found[1])
        return name

    assert relabel("ray_vllm_ext_activation_ratio") == "vllm_ext:activation_ratio"
    assert relabel("ray_vllm_kv_cache_usage_perc") == "vllm:kv_cache_usage_perc"
    assert relabel("ray_node_cpu_count") == "ray_node_cpu_count"


def test_legends_are_filled_from_labels() -> None:
    assert legend("{{method}} {{ kind }} now", {"method": "M", "kind": "own"}) == "M own now"
    assert legend("{{gone}}p95", {}) == "p95"


def test_no_line_is_drawn_where_there_was_no_server() -> None:
    seconds, values = with_gaps([(0.0, 1.0), (2.0, 1.0), (30.0, 2.0)])
    assert seconds == [0.0, 2.0, 4.0, 30.0]
    assert [value != value for value in values] == [False, False, True, False]
