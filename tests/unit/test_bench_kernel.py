"""``vllm-ext bench kernel``: its grammar, that it runs, and that it notices wrong results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from attn_backends.ops.dispatch import OpContext, OpImpl
from vllm_ext.bench import baselines, cases, kernel_report, timing
from vllm_ext.bench.workloads import Row, make_problem, parse_batches, preset
from vllm_ext.cli import main
from vllm_ext.errors import UserError


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """These problems are tiny: on a busy machine threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("8q1s4k", [[Row(1, 4096)] * 8]),
        ("q512s4k", [[Row(512, 4096)]]),
        ("2q1ks2k", [[Row(1024, 2048)] * 2]),
        ("q5s5+2q1s7, q1s1", [[Row(1, 7), Row(1, 7), Row(5, 5)], [Row(1, 1)]]),  # decode first
    ],
)
def test_batches_are_read(text: str, rows: list[list[Row]]) -> None:
    assert [list(spec.rows) for spec in parse_batches(text)] == rows


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("8q1", ["'8q1'", "8q1s4k"]),
        ("8q1s4k,", ["''", "8q1s4k"]),
        ("8q1s4k+x", ["'x'", "8q1s4k"]),
        ("1q1s4m", ["'1q1s4m'"]),
        ("0q1s4k", ["'0q1s4k'", "zero"]),
        ("q2ks1k", ["'q2ks1k'", "2048", "q2ks2k works"]),
    ],
)
def test_bad_batches_name_the_term_and_one_that_works(text: str, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        parse_batches(text)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--ops", "nope"], ["--ops", "nope", "sparse_decode"]),
        (["--impls", "gpu"], ["--impls", "gpu", "triton"]),
        (["--rounds", "0"], ["--rounds"]),
        (["--query-heads", "4"], ["--query-heads", "4", "--kv-heads", "3"]),
        (["--head-size", "0"], ["--head-size", "0"]),
        (["--budget-tokens", "0"], ["--budget-tokens", "'0'", "512, 10%"]),
        (["--budget-tokens", "0%"], ["--budget-tokens", "'0%'"]),
        (["--budget-tokens", "many"], ["--budget-tokens", "many"]),
        (["--block-size", "16,0"], ["--block-size", "16,0"]),
    ],
)
def test_user_errors_exit_2(
    argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "kernel", *argv]) == 2
    message = capsys.readouterr().err
    assert len(message.strip().splitlines()) == 1
    for word in words:
        assert word in message


def _bench(monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    """The command on the CPU, one round of everything."""
    monkeypatch.setitem(timing.BANDWIDTH_BYTES, "cpu", 1 << 20)
    monkeypatch.setattr(timing, "MIN_SAMPLE_MS", 0.1)
    return main(["bench", "kernel", "--device", "cpu", "--rounds", "1", *argv])


def test_every_op_agrees_and_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "new" / "kernel"
    batches = "2q1s96,1q1s40+q5s70"
    argv = ("--batches", batches, "--impls", "cpu,reference", "--output", str(target))
    assert _bench(monkeypatch, *argv) == 0
    result = json.loads(target.with_suffix(".json").read_text())
    assert target.with_suffix(".md").read_text() in capsys.readouterr().out
    rows = result["rows"]
    assert not any(row["failure"] for row in rows)
    for batch in batches.split(","):
        reported = {(row["op"], row["impl"]) for row in rows if row["batch"] == batch}
        for op in ("sparse_decode", "anchor", "dense decode", "block_topk", "cache_write"):
            assert {(op, "cpu"), (op, "reference")} <= reported
        assert ("paged_attention", "cpu") in reported
    sparse = next(row for row in rows if row["op"] == "sparse_decode")
    assert sparse["read_bytes"] == 2 * 96 * 3 * 2 * 64 * 2  # the budget is more than the context
    assert [check["name"] for check in result["checks"]] == ["anchor / dense decode"] * 2


def _leave_one_block_out(*arguments: Any) -> None:
    *_, selection, _rule, _scale, _out = arguments
    selection.counts.sub_(1)  # the last block is not read
    cases.reference_of("sparse_decode").run(*arguments)
    selection.counts.add_(1)


def _do_nothing(*arguments: Any) -> None:
    """Leaves results as they were."""


def _raise(*arguments: Any) -> None:
    raise RuntimeError("no such kernel")


@pytest.mark.parametrize(
    ("op", "run", "words"),
    [
        ("sparse_decode", _leave_one_block_out, "largest error"),
        ("anchor_decode", _do_nothing, "largest error nan"),
        ("block_topk", _do_nothing, "must be bit-equal"),
        ("cache_write", _do_nothing, "must be bit-equal"),
        ("paged_attention", _raise, "RuntimeError: no such kernel"),
    ],
)
def test_wrong_results_fail_loudly(
    op: str,
    run: Any,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fakes = [OpImpl(op, "cpu", run, lambda context: None), cases.reference_of(op)]
    monkeypatch.setitem(cases.OPS, op, lambda: fakes)
    assert _bench(monkeypatch, "--batches", "2q1s96", "--impls", "cpu", "--ops", op) == 1
    output = capsys.readouterr().out
    assert "| **FAILED** |" in output
    assert words in output


def test_what_cannot_serve_is_listed_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ("--batches", "1q1s20", "--ops", "block_topk,cache_write", "--head-size", "24")
    assert _bench(monkeypatch, *argv, "--impls", "cpu") == 0
    reason = "not run: cpu of block_topk, cache_write: head_size 24 is not a multiple of 16"
    output = capsys.readouterr().out
    assert reason in output
    assert (
        "not run: engine of paged_attention: the engine's kernel does not take heads of 24"
        in output
    )


def test_the_contiguous_baseline_reads_the_pages_rightly() -> None:
    problem = make_problem(parse_batches("3q1s100")[0], preset("demo", 32), "cpu")
    case = cases.make_cases(problem, ["paged_attention"], 512)[0]
    run = baselines.ContiguousAttention(baselines.sdpa).run
    sdpa = OpImpl("paged_attention", "sdpa", run, lambda context: None)
    assert cases.mismatch(sdpa, case, cases.expectations(case)) is None


def test_contiguous_baselines_refuse_ragged_rows_and_prefill() -> None:
    context = make_problem(parse_batches("q1s8")[0], preset("demo", 32), "cpu").context
    for text, reason in (("2q1s8", None), ("q1s8+q1s9", "equal"), ("q2s8", "equal")):
        found = _sdpa_reason(text, context)
        assert (found is None) if reason is None else (reason in str(found))


def _sdpa_reason(text: str, context: OpContext) -> str | None:
    impls = baselines.dense_baselines(parse_batches(text)[0], "cuda")
    return next(impl for impl in impls if impl.name == "sdpa").unsupported_reason(context)


def test_copies_fill_the_caches_but_are_few() -> None:
    problem = make_problem(parse_batches("q1s8")[0], preset("demo", 32), "cpu")
    assert len(problem.caches) == 4
    assert all(torch.equal(problem.caches[0], cache) for cache in problem.caches)


class _GpuLikeTimer:
    """The CPU's clock with a figure that GPUs have."""

    def prepare(self, run: timing.Run, calls: timing.Calls) -> timing.Timed:
        timed = timing.CpuTimer().prepare(run, calls)
        timed.host_us = 7.0
        return timed


def test_what_a_gpu_reports_follows_from_its_timer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(timing.TIMERS, "cpu", _GpuLikeTimer)
    target = tmp_path / "kernel"
    argv = ("--batches", "2q1s96,q64s96", "--impls", "cpu", "--output", str(target))
    assert _bench(monkeypatch, *argv) == 0
    rows = json.loads(target.with_suffix(".json").read_text())["rows"]
    assert {row["host_us"] for row in rows} == {7.0}
    prefill = next(row for row in rows if row["batch"] == "q64s96" and "attention" in row["op"])
    flops = 4 * 9 * 64 * sum(range(96 - 64 + 1, 96 + 1))  # the first query sees 33 tokens
    assert prefill["tflops"] == pytest.approx(flops / prefill["ms_median"] / 1e9)
    assert [row["op"] for row in rows if "tflops" in row] == ["paged_attention"]
    assert "| host us per call | TFLOP/s |" in capsys.readouterr().out


def test_block_sizes_are_run_and_judged_apart(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ("--batches", "1q1s40,1q1s96", "--ops", "dense_decode,sparse_decode", "--impls", "cpu")
    assert _bench(monkeypatch, *argv, "--block-size", "32,64", "--budget-tokens", "32") == 0
    output = capsys.readouterr().out
    assert "blocks of 32 and 64 tokens" in output
    for block_size in (32, 64):
        assert f"| 1q1s96, blocks of {block_size} | sparse_decode | cpu |" in output
        assert f"(cpu, 1q1s96 / 1q1s40, blocks of {block_size})" in output


def test_a_budget_may_be_a_share_of_the_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "kernel"
    argv = ("--batches", "1q1s320,1q1s640", "--ops", "sparse_decode", "--impls", "cpu")
    assert _bench(monkeypatch, *argv, "--budget-tokens", "50%", "--output", str(target)) == 0
    result = json.loads(target.with_suffix(".json").read_text())
    read = [row["read_bytes"] for row in result["rows"] if row["op"] == "sparse_decode"]
    assert read == [tokens * 3 * 2 * 64 * 2 for tokens in (160, 320)]
    assert result["checks"] == []  # the longer context has the larger budget
    assert "budget 50% of the context" in capsys.readouterr().out


def test_attention_of_a_model_is_summed_up_against_the_fastest_dense_baseline() -> None:
    times = {"dense decode": 1.0, "anchor, masses only": 0.5, "block_topk": 0.02}
    times |= {"sparse_decode": 0.1}
    rows = [
        {"batch": "8q1s128k", "block_size": size, "op": op, "impl": "triton", "ms": [ms]}
        | {"ms_median": ms * size / 16, "is_baseline": False}
        for size in (16, 32)
        for op, ms in times.items()
    ]
    rows += [
        rows[0] | {"op": "paged_attention", "impl": impl, "ms_median": ms, "is_baseline": True}
        for impl, ms in (("flash_attn", 0.95), ("sdpa", 0.9))
    ]
    (found,) = kernel_report.composed(rows)  # blocks of 32 have no baseline
    total_ms = 1 + 8 * (0.5 + 0.02) + 31 * 0.1
    assert found["where"] == "triton, 8q1s128k, blocks of 16"
    assert (found["dense"], found["dense_ms"]) == ("sdpa", pytest.approx(32 * 0.9))
    assert found["ratio"] == pytest.approx(32 * 0.9 / total_ms)


def test_flash_attention_is_launched_as_vllm_would(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []

    def impl(op: str) -> OpImpl:
        return OpImpl(op, "engine", lambda *_: launched.append(op), lambda context: None)

    both = [impl("paged_attention"), impl("dense_decode")]
    monkeypatch.setattr(baselines.engine_ops, "implementations", lambda device_type: both)
    for text in ("3q1s100", "q1s8+q5s9"):
        problem = make_problem(parse_batches(text)[0], preset("demo", 32), "cpu")
        flash = baselines.dense_baselines(problem.spec, "cuda")[0]
        assert flash.name == "flash_attn"
        case = cases.make_cases(problem, ["paged_attention"], 512)[0]
        flash.run(*case.calls[0])
    assert launched == ["dense_decode", "paged_attention"]


def test_derived_checks_compare_like_with_like() -> None:
    specs = parse_batches("8q1s4k,8q1s32k,2q1s64k,8q1s512,8q1s1k+q9s64k")
    rows: list[dict[str, Any]] = []
    for spec, sparse_ms in zip(specs, (2.0, 3.0, 9.0, 0.1, 0.1), strict=True):
        for op, ms in (("sparse_decode", sparse_ms), ("anchor", 6.0), ("dense decode", 5.0)):
            row = {
                "batch": spec.text,
                "block_size": 32,
                "op": op,
                "impl": "cpu",
                "ms": [ms],
                "ms_median": ms,
            }
            rows += [row, row | {"impl": "reference"}]
    *anchors, flat = kernel_report.derived_checks(specs, rows, budget_tokens=512)
    assert [(check["ratio"], check["holds"]) for check in anchors] == [(1.2, False)] * 5
    assert flat["where"] == "cpu, 8q1s32k / 8q1s4k"
    assert flat["ratio"] == 1.5
    assert not flat["holds"]
