"""The load test's grid, summaries, resumption, report and refusals; no server."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from deploy.loadtest import __main__ as command
from deploy.loadtest import client, crossover, endpoint, grid, report
from deploy.loadtest.run import tokenizer_of
from deploy.loadtest.server import serve_words
from deploy.loadtest.store import Store
from vllm_ext.errors import UserError

MACHINE = {"cpu": "2 x test", "vllm": "0.32.0", "python": "3.11", "gpu": "none"}
SETTINGS: dict[str, Any] = {"slo_ms": {"ttft": 500.0}, "seed": 0, "tokenizer": None}


def _cell(**changes: Any) -> grid.Cell:
    values: dict[str, Any] = {
        "workload": grid.DISTINCT,
        "prompt_tokens": 1000,
        "output_tokens": 32,
        "concurrency": 4,
        "requests_per_client": 2,
    }
    return grid.Cell(**values | changes)


def _requests(cell: grid.Cell, seed: int = 0) -> list[dict[str, Any]]:
    return [json.loads(line) for line in grid.trace(cell, seed)]


def test_distinct_prompts_share_no_chunk_with_any_other_cell_or_seed() -> None:
    requests = _requests(_cell()) + _requests(_cell(concurrency=1)) + _requests(_cell(), seed=1)
    chunks = [chunk for request in requests for chunk in request["hash_ids"]]
    assert len(set(chunks)) == len(chunks)
    assert {len(request["hash_ids"]) for request in requests} == {63}  # 62.5 chunks of 16
    assert {request["input_length"] for request in requests} == {1000}
    assert grid.trace(_cell(), 0) == grid.trace(_cell(), 0)


def test_shared_prefixes_are_primed_and_three_quarters_long() -> None:
    cell = _cell(workload=grid.SHARED_PREFIX, prompt_tokens=1600)
    prompts = [request["hash_ids"] for request in _requests(cell)]
    assert all(prompt[:75] == prompts[0][:75] for prompt in prompts)
    tails = [chunk for prompt in prompts for chunk in prompt[75:]]
    assert len(set(tails)) == 8 * 25
    (priming,) = [json.loads(line) for line in grid.priming_trace(cell, 0)]
    assert priming["hash_ids"] == prompts[0][:75]
    assert (priming["input_length"], priming["output_length"]) == (1200, 1)
    assert grid.priming_trace(_cell(), 0) == []


def test_in_the_mixed_workload_prefills_pass_through_the_last_place() -> None:
    cell = _cell(workload=grid.MIXED)
    assert [request["output_length"] for request in _requests(cell)] == [32] * 4 + [1] * 4
    assert [request["timestamp"] for request in _requests(cell)] == [0] * 4 + [1] * 4
    assert (cell.num_requests, cell.max_in_flight) == (8, 5)
    # The decoders find their prompts in the cache, and are decoding when prefills come.
    primed = [json.loads(line)["hash_ids"] for line in grid.priming_trace(cell, 0)]
    assert primed == [request["hash_ids"] for request in _requests(cell)[:4]]
    assert _cell().max_in_flight == 4


def _bench_result(**changes: Any) -> dict[str, Any]:
    result: dict[str, Any] = {
        "duration": 2.0,
        "completed": 2,
        "failed": 1,
        "errors": ["", "Traceback ...\naiohttp.ServerDisconnectedError: gone", ""],
        "output_lens": [32, 0, 20],
        "output_throughput": 26.0,
        "request_throughput": 1.0,
        "request_goodput": None,
        "total_input_tokens": 2000,
        "total_output_tokens": 52,
    }
    for number, name in enumerate(client.LATENCIES):
        for key in ("mean", "p50", "p90", "p95", "p99"):
            result[f"{key}_{name}_ms"] = 10.0 * (number + 1)
    return result | changes


def test_summaries_count_failed_and_shortened_answers() -> None:
    summary = client.summarise(_bench_result(), [32, 32, 32])
    assert (summary["completed"], summary["failed"], summary["cut_short"]) == (2, 1, 1)
    assert summary["errors"] == {"aiohttp.ServerDisconnectedError: gone": 1}
    assert summary["latency_ms"]["tpot"]["p99"] == 20.0
    assert summary["good_requests_per_s"] is None


def test_summaries_have_no_figure_where_nothing_was_measured() -> None:
    nothing = _bench_result(completed=0, failed=3, output_lens=[0, 0, 0], output_throughput=0.0)
    assert client.summarise(nothing, [32] * 3)["latency_ms"]["ttft"]["p50"] is None
    one_token = _bench_result(failed=0, errors=[""] * 3, output_lens=[1] * 3)
    latencies = client.summarise(one_token, [1] * 3)["latency_ms"]
    assert latencies["tpot"]["p50"] is None
    assert latencies["e2el"]["p50"] == 40.0
    assert (
        client.summarise(_bench_result(p99_itl_ms=float("nan")), [32] * 3)["latency_ms"]["itl"][
            "p99"
        ]
        is None
    )


def test_the_benchmarks_command_line_has_the_slo_and_no_key(monkeypatch: Any) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    monkeypatch.setenv("OPENAI_API_KEY", "of somebody else")
    monkeypatch.setenv("HTTP_PROXY", "http://proxy")
    target = client.Target("http://127.0.0.1:1", "m", "t", {"ttft": 500.0, "tpot": 50.0})
    words = client.bench_words(target, Path("t.jsonl"), 8, 5)
    at = words.index("--goodput")
    assert words[at + 1 :] == ["ttft:500.0", "tpot:50.0"]
    assert "secret" not in " ".join(words)
    env = client.client_environment(allow_remote=False)
    assert env["OPENAI_API_KEY"] == "secret"
    assert "HTTP_PROXY" not in env
    assert "HTTP_PROXY" in client.client_environment(allow_remote=True)


METRICS = """
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0"} 0.25
vllm:kv_cache_usage_perc{engine="1"} 0.5
# TYPE vllm:prefix_cache_hits_total counter
vllm:prefix_cache_hits_total{engine="0"} 30.0
# TYPE vllm:prefix_cache_queries_total counter
vllm:prefix_cache_queries_total{engine="0"} 40.0
# TYPE vllm_ext:decode_rows_total counter
vllm_ext:decode_rows_total{method="M",path="sparse",reason="selected"} 9.0
vllm_ext:decode_rows_total{method="M",path="dense",reason="short_context"} 3.0
# TYPE vllm_ext:activation_ratio gauge
vllm_ext:activation_ratio{method="M"} 0.75
"""


def test_figures_are_the_cells_own_and_their_names_those_of_ray_too() -> None:
    after = endpoint.read_figures(METRICS)
    before = endpoint.Figures(rows={"dense short_context": 3.0, "sparse selected": 1.0})
    found = endpoint.difference(before, after, peak_kv_use=0.5)
    assert found["decode_rows"] == {"sparse selected": 8.0}
    assert found["activation_ratio"] == 1.0
    assert found["activation_ratio_since_start"] == 0.75
    assert found["prefix_hit_share"] == 0.75
    assert found["preemptions"] is None
    assert after.kv_use == 0.5
    ray = METRICS.replace("vllm_ext:", "ray_vllm_ext_").replace("vllm:", "ray_vllm_")
    assert endpoint.read_figures(ray) == after
    drafting = endpoint.read_figures(METRICS.replace("decode_rows", "draft_rows"))
    assert drafting.rows == after.rows, "a lossless server has drafts instead"


def test_rays_late_figures_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = METRICS.replace("vllm_ext:", "ray_vllm_ext_").replace("vllm:", "ray_vllm_")
    pages = [ray, ray.replace("9.0", "40.0")]  # before and after the wait
    waits: list[float] = []
    monkeypatch.setattr(endpoint, "fetch", lambda _: pages[len(waits)])
    monkeypatch.setattr(endpoint.time, "sleep", waits.append)
    assert endpoint.settled_figures("http://[::1]:1").rows["sparse selected"] == 40.0
    assert waits == [endpoint.RAY_LAG_S]
    pages[1] = METRICS  # not Ray's: what it says now is what has happened
    assert endpoint.settled_figures("http://[::1]:1").rows["sparse selected"] == 9.0
    assert len(waits) == 1


def test_a_server_without_the_extension_has_no_activation_ratio() -> None:
    stock = endpoint.read_figures("# TYPE vllm:x gauge\nvllm:x 1\n")
    found = endpoint.difference(stock, stock, None)
    assert found["activation_ratio"] is None
    assert found["activation_ratio_since_start"] is None


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        pytest.param([(512, 1.2), (1024, 1.1), (4096, 0.9)], 2048, id="between"),
        pytest.param([(512, 0.9), (1024, 1.1), (4096, 0.9)], 2048, id="last-crossing"),
        pytest.param([(512, 0.9), (1024, 0.8)], 512, id="always-faster"),
        pytest.param([(512, 0.9), (1024, 1.0)], None, id="not-at-the-end"),
        pytest.param([], None, id="nothing"),
    ],
)
def test_crossover(points: list[tuple[int, float]], expected: float | None) -> None:
    found = crossover.crossover_tokens(points)
    assert found == (None if expected is None else pytest.approx(expected))


def _record(arm: str, cell: grid.Cell, tpot_ms: float) -> dict[str, Any]:
    summary = client.summarise(_bench_result(p50_tpot_ms=tpot_ms), [32] * 3)
    figures = endpoint.read_figures(METRICS)
    server = endpoint.difference(endpoint.Figures(), figures, 0.5) | {"metrics_failure": None}
    record = {"arm": arm, "cell": asdict(cell), "failure": None, "measured_on": "2026-11-24"}
    return record | summary | {"server": server}


def _result(tmp_path: Path) -> dict[str, Any]:
    store = Store(tmp_path / "run.json", SETTINGS, MACHINE)
    store.add_note("commit abc")
    for arm in ("stock", "TIDAL_DECODE"):
        store.add_arm(arm, {"url": "http://127.0.0.1:1", "serve": None})
        for prompt_tokens, ratio in ((512, 1.25), (2048, 0.5)):
            tpot_ms = 40.0 * (1 if arm == "stock" else ratio)
            store.add(_record(arm, _cell(prompt_tokens=prompt_tokens), tpot_ms))
    failed = _record("TIDAL_DECODE", _cell(workload=grid.MIXED), 1.0)
    store.add(failed | {"failure": "Traceback\nValueError: <broken>"})
    store.add_not_run("stock", _cell(workload=grid.MIXED), "no time was left")
    return store.result


def test_ratios_are_to_the_first_arm_and_leave_out_failures(tmp_path: Path) -> None:
    ratios = crossover.tpot_ratios(_result(tmp_path))
    points = [crossover.Point(512, 1.25), crossover.Point(2048, 0.5)]
    assert ratios == {((grid.DISTINCT, 32, 4), "TIDAL_DECODE"): points}


def test_lengths_served_dense_do_not_count_as_the_methods() -> None:
    dense, sparse = crossover.Point(512, 0.9, is_active=False), crossover.Point(2048, 0.8)
    assert "from 2,048 tokens, the shortest where it was active" in crossover.verdict(
        [dense, sparse]
    )
    assert crossover.verdict([dense]).startswith("never active")
    slow = [crossover.Point(512, 1.25), crossover.Point(2048, 1.1)]
    assert crossover.verdict(slow) == "not faster at 2,048 tokens"


def test_the_report_shows_every_error_and_loads_nothing(tmp_path: Path) -> None:
    result = _result(tmp_path)
    paths = report.write(result, tmp_path / "run")
    text, page = (path.read_text() for path in paths)
    for shown in (text, page):
        assert "faster from about 813 tokens" in shown
        assert "aiohttp.ServerDisconnectedError: gone" in shown
        assert "not run: no time was left" in shown
        assert "2 of 3" in shown
        assert "short_context: 3" in shown
        assert "Measured on 2026-11-24: 2 x test" in shown
        assert "commit abc" in shown
    assert "ValueError: <broken>" in text
    assert "ValueError: &lt;broken&gt;" in page
    assert page.count("src='data:image/svg+xml;base64,") == 2
    for loader in ("<link", "<script", "@import", "url(", "src='http", 'src="http'):
        assert loader not in page


def test_a_run_is_continued_where_it_stopped(tmp_path: Path) -> None:
    _result(tmp_path)
    again = Store(tmp_path / "run.json", SETTINGS, MACHINE)
    assert again.has("stock", _cell(prompt_tokens=512))
    assert not again.has("stock", _cell(prompt_tokens=512, concurrency=8))
    assert not again.has("TIDAL_DECODE", _cell(workload=grid.MIXED))  # its client failed
    again.add(_record("TIDAL_DECODE", _cell(workload=grid.MIXED), 1.0))
    assert again.has("TIDAL_DECODE", _cell(workload=grid.MIXED))
    assert len(again.result["cells"]) == 5
    assert again.result["not_run"] == []
    assert again.result["notes"] == ["commit abc"]


def test_a_run_with_other_settings_is_not_continued(tmp_path: Path) -> None:
    _result(tmp_path)
    path = tmp_path / "run.json"
    with pytest.raises(UserError, match="settings seed 0, now it is 1"):
        Store(path, SETTINGS | {"seed": 1}, MACHINE)
    with pytest.raises(UserError, match="machine cpu"):
        Store(path, SETTINGS, MACHINE | {"cpu": "4 x other"})
    again = Store(path, SETTINGS, MACHINE)
    with pytest.raises(UserError, match="arm stock's url"):
        again.add_arm("stock", {"url": "http://127.0.0.1:2", "serve": None})
    assert Store(path, SETTINGS | {"seed": 1}, MACHINE, is_fresh=True).result["cells"] == []
    path.write_text("{}")
    with pytest.raises(UserError, match="is not a load test"):
        Store(path, SETTINGS, MACHINE)


def _parse(*words: str) -> Any:
    return command._parser().parse_args(list(words))


def test_running_arms_keep_their_order_and_may_have_metrics_elsewhere() -> None:
    args = _parse("--arm", "stock=http://127.0.0.1:8401/", "--arm", "ray=http://localhost:8402")
    args.metrics_url = ["ray=http://127.0.0.1:8080/metrics"]
    first, second = command.running_arms(args)
    assert (first.name, first.url) == ("stock", "http://127.0.0.1:8401")
    assert first.metrics_url == "http://127.0.0.1:8401/metrics"
    assert second.metrics_url == "http://127.0.0.1:8080/metrics"


def test_started_arms_are_stock_and_every_method_but_bounds_and_those_that_need_a_profile() -> None:
    args = _parse("--start", "--budget-tokens", "256", "--no-strict")
    arms = {arm.name: arm for arm in command.started_arms(args, [_cell()])}
    assert {"stock", "TIDAL_DECODE", "SINK_WINDOW", "SPARSE_FULL"} <= {*arms}
    assert not {"ORACLE_TOPK", "MOA", "FLUX"} & {*arms}
    assert next(iter(arms)) == "stock"  # the report compares with it
    words = " ".join(arms["TIDAL_DECODE"].serve_words or ())
    assert "--attention-backend TIDAL_DECODE" in words
    assert "--budget-tokens 256" in words
    assert "--no-strict" in words
    assert "--max-model-len 1096" in words
    assert "budget" not in " ".join(arms["SINK_WINDOW"].serve_words or ())
    assert "--attention-backend" not in serve_words("stock", "m", 1, "--enforce-eager", {})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--url", "http://192.168.0.1:8000"], "at 192.168.0.1, not on this machine"),
        (["--url", "http://0.0.0.0:8000"], "not on this machine"),
        (["--url", "127.0.0.1:8000"], "must be like http://127.0.0.1:8000"),
        (["--arm", "http://127.0.0.1:8000"], "must be NAME=URL"),
        (["--arm", "a=http://[::1]:1", "--arm", "a=http://[::1]:2"], "a is given twice"),
        (["--arm", "a=http://[::1]:1", "--metrics-url", "b=http://[::1]:2"], "no arm is named b"),
        (["--url", "http://127.0.0.1:1", "--metrics-url", "server=http://10.0.0.1/m"], "10.0.0.1"),
        (["--url", "http://127.0.0.1:1", "--start"], "give one of --url, --arm and --start"),
        ([], "given: none"),
        (["--start", "--arms", "stock,SPARSE_FUL"], "unknown SPARSE_FUL"),
        (["--start", "--small", "--lengths", "512"], "leave out --lengths"),
        (["--start", "--workloads", "mixd"], "unknown mixd"),
        (["--start", "--max-requests", "10"], "more than --max-requests 10"),
    ],
)
def test_refusals(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([*words, "--output", "/nonexistent/run"]) == 2
    assert message in capsys.readouterr().err


def test_an_id_without_a_folder_means_the_model_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    assert tokenizer_of("tiny") == "models/tiny"  # Ray's model list
    assert tokenizer_of("models/tiny") == "models/tiny"  # vLLM's
    assert tokenizer_of("org/other") == "org/other"


def test_a_note_is_kept_for_the_reader(tmp_path: Path) -> None:
    words = ["--url", "http://127.0.0.1:1", "--small", "--note", "of commit abc"]
    assert command.main([*words, "--output", str(tmp_path / "run")]) == 1  # no server there
    assert json.loads((tmp_path / "run.json").read_text())["notes"] == ["of commit abc"]


def test_a_watch_that_is_given_a_reading_takes_only_the_last(monkeypatch: Any) -> None:
    readings = iter([endpoint.Figures(rows={"sparse": 7.0})])
    monkeypatch.setattr(endpoint, "settled_figures", lambda url: next(readings))
    with endpoint.Watch("http://127.0.0.1:9", endpoint.Figures(rows={"sparse": 3.0})) as watch:
        pass
    assert watch.result()["decode_rows"] == {"sparse": 4.0}
    assert watch.after is not None
    assert watch.after.rows == {"sparse": 7.0}
