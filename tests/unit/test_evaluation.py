"""The evaluation's prompts, columns, forcing and report; no engine."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch

from attn_backends.config import ConfigError, settings_of
from attn_backends.methods import REGISTRY, load_method
from vllm_ext.bench.machine import machine
from vllm_ext.cli import eval as eval_command
from vllm_ext.errors import UserError
from vllm_ext.evaluation import prompts, report, run
from vllm_ext.evaluation.run import DENSE, make_columns


class Characters:
    """A tokenizer of one token per character."""

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}


def _text(ids: list[int]) -> str:
    return "".join(map(chr, ids))


def test_needles_are_where_they_should_be_and_asked_for_at_the_end() -> None:
    counts = {"passkey": [3, 1], "multi_key": [1, 1], "multi_value": [1, 1]}
    found = prompts.needle_prompts(Characters(), 3, counts, [2000, 4000], [0.0, 0.5, 1.0])
    assert len(found) == (5 + 3) * 3
    assert sum(prompt.length_tokens == 2000 for prompt in found) == 5 * 3
    assert found == prompts.needle_prompts(Characters(), 3, counts, [2000, 4000], [0.0, 0.5, 1.0])
    for prompt in found:
        text = _text(prompt.ids)
        assert prompt.length_tokens - 200 < len(text) <= prompt.length_tokens
        assert text.endswith(" is")
        assert prompt.score(text) == 1.0
        assert prompt.score("") == 0.0
        where = text.index(prompt.answers[0]) / len(text)
        assert abs(where - prompt.depth) < 0.25


def test_texts_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("".join(chr(33 + i % 90) for i in range(5000)))
    first = prompts.text_prompts(Characters(), 1, 3, 500, corpus)
    assert [len(ids) for ids in first] == [500] * 3
    with pytest.raises(UserError, match=r"corpus.txt has 5000 tokens, less than the 5001"):
        prompts.text_prompts(Characters(), 1, 1, 5001, corpus)
    assert first == prompts.text_prompts(Characters(), 1, 3, 500, corpus)
    assert [len(ids) for ids in first] == [500] * 3
    assert len(prompts.text_prompts(Characters(), 1, 2, 500, None)[1]) == 500


def test_columns_share_engines_where_requests_may_choose() -> None:
    columns = make_columns(["TIDAL_DECODE", "SINK_WINDOW"], [256, 512], {"sink_tokens": 32})
    assert [c.name for c in columns] == [
        DENSE,
        "TIDAL_DECODE@256",
        "TIDAL_DECODE@512",
        "SINK_WINDOW@256",
        "SINK_WINDOW@512",
    ]
    assert columns[0].method == "TIDAL_DECODE"
    assert columns[0].extra_args == {"sparse": "off"}
    assert columns[0].settings == columns[1].settings == columns[2].settings
    assert columns[3].settings == {"sink_tokens": 32, "window_tokens": 224}
    alone = make_columns(["SINK_WINDOW"], [512], {})
    assert (alone[0].method, alone[1].settings["window_tokens"]) == ("SPARSE_FULL", 448)


def test_answers_that_are_stock_s_are_not_compared() -> None:
    with pytest.raises(UserError, match=r"--lossless-tokens is 4: .* nothing to compare"):
        make_columns(["TIDAL_DECODE"], [256], {"lossless_tokens": 4})


def test_a_budget_that_requests_cannot_choose_is_an_engine_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fixed = dataclasses.replace(load_method("TIDAL_DECODE"), row_options=frozenset())
    methods = {"FIXED": fixed, "SPARSE_FULL": load_method("SPARSE_FULL")}
    monkeypatch.setattr(run, "load_method", methods.__getitem__)
    columns = make_columns(["FIXED", "SPARSE_FULL"], [256, 512], {"sink_tokens": 16})
    assert [(c.name, c.settings, c.extra_args) for c in columns] == [
        (DENSE, {}, None),
        ("FIXED@256", {"sink_tokens": 16, "budget_tokens": 256}, None),
        ("FIXED@512", {"sink_tokens": 16, "budget_tokens": 512}, None),
        ("SPARSE_FULL", {}, None),
    ]


def test_a_budget_among_the_settings_is_no_reason_to_leave_columns_out() -> None:
    columns = make_columns(["TIDAL_DECODE"], [256, 512], {"budget_tokens": 256})
    assert [column.name for column in columns[1:]] == ["TIDAL_DECODE@256", "TIDAL_DECODE@512"]


@pytest.mark.parametrize("name", REGISTRY)
def test_a_reach_that_a_method_names_is_made_of_its_settings(name: str) -> None:
    method = load_method(name)
    default = next(f.default for f in dataclasses.fields(method) if f.name == "reach")
    assert method.reach == default or {*method.reach} <= {*settings_of(method.config_cls)}


def test_what_a_method_refuses_is_said_before_any_engine_starts() -> None:
    with pytest.raises(ConfigError, match="sink_tokens is -1"):
        make_columns(["TIDAL_DECODE"], [512], {"sink_tokens": -1})


@pytest.mark.parametrize("gpu", [None, "NVIDIA H200"])
def test_figures_name_the_gpu_where_there_is_one(
    gpu: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: gpu)
    assert machine()["gpu"] == (gpu or "none")


class _FirstRunner:
    """A request on vLLM's first model runner, and what it has been given so far."""

    def __init__(self, asked: dict[str, Any]) -> None:
        from vllm_ext.forcing import KEY, ForcingProcessor

        self._processor = ForcingProcessor(None, torch.device("cpu"), False)
        self._output: list[int] = []
        params = SimpleNamespace(extra_args={KEY: asked})
        self._processor.update_state(
            SimpleNamespace(added=[(0, params, None, self._output)], removed=[], moved=[])
        )

    def step(self, logits: torch.Tensor, step: int) -> torch.Tensor:
        """``step`` is -1 after a chunk of the prompt that is not the last."""
        self._output[:] = [0] * max(0, step)
        return self._processor.apply(logits)


class _SecondRunner:
    """The same on its second one, in slot 2, behind a row of nobody's."""

    def __init__(self, asked: dict[str, Any]) -> None:
        from vllm_ext.forcing import KEY, ForcingProcessor

        state = SimpleNamespace(prompt_len=SimpleNamespace(np=numpy.array([0, 4, 7])))
        self._processor = ForcingProcessor(None, state)
        assert self._processor.add_request(1, SimpleNamespace(extra_args={KEY: asked}))
        assert not self._processor.add_request(1, SimpleNamespace(extra_args=None))  # used again
        assert self._processor.add_request(2, SimpleNamespace(extra_args={KEY: asked}))

    def step(self, logits: torch.Tensor, step: int) -> torch.Tensor:
        """As above."""
        context = SimpleNamespace(
            idx_mapping_np=numpy.array([1, 2]), seq_lens_upper_bound_np=numpy.array([4, 7 + step])
        )
        both = torch.cat([torch.zeros_like(logits), logits])
        found = self._processor.apply(both, context)
        assert not found[0].any()
        return found[1:]


@pytest.mark.parametrize("runner_cls", [_FirstRunner, _SecondRunner])
def test_forcing_compares_full_distributions_and_forces(tmp_path: Path, runner_cls: Any) -> None:
    pytest.importorskip("vllm")
    from vllm_ext.forcing import ForcingProcessor

    file = str(tmp_path / "dense.npy")
    numpy.save(file, numpy.zeros((2, 5), dtype=numpy.float32))
    torch.manual_seed(0)
    logits = torch.randn(2, 5)
    for name, tokens in ((None, None), ("same", [3, 1]), ("other", [3, 1])):
        runner = runner_cls({"name": name, "file": file, "tokens": tokens})
        runner.step(torch.randn(1, 5), -1)
        for step in range(3):  # one more than asked for, as engines may run ahead
            given = logits[[min(step, 1)]].clone() + (torch.eye(5)[[0]] if name == "other" else 0)
            result = runner.step(given, step)
            if tokens is not None and step < 2:
                assert int(result.argmax()) == tokens[step]
    same, other = (ForcingProcessor.results.pop(name).values() for name in ("same", "other"))
    assert len(same) == len(other) == 2
    assert all(abs(kl) < 1e-6 and agrees for kl, agrees in same)
    assert all(kl > 1e-3 for kl, _ in other)


def _evaluation() -> dict[str, Any]:
    scores = {DENSE: 1.0, "TIDAL_DECODE@512": 0.5}
    needle = {"kind": "passkey", "length_tokens": 2048, "depth": 0.5, "scores": scores}
    work = {"model": "m/x", "lengths_tokens": [2048], "depths": [0.5], "text_prompts": 1}
    work |= {"text_tokens": 10, "text_steps": 2, "seed": 0, "dtype": "bfloat16"}
    return {
        "columns": list(scores),
        "needles": [needle, needle],
        "texts": {"TIDAL_DECODE@512": {"kl": [0.1, 0.3], "agrees": [1.0, 0.0]}},
        "nll_by_position": report.nll_by_position({DENSE: [[-1.0] * 900, [-3.0] * 900]}),
        "workload": work,
        "machine": {"vllm": "0.32", "cpu": "2 x", "gpu": "none"},
    }


def test_the_report_has_a_row_per_column_and_its_plots(tmp_path: Path) -> None:
    table = report.markdown(_evaluation())
    assert "| dense | 100.0% | 100.0% |  |  |" in table
    assert "| TIDAL_DECODE@512 | 50.0% | 50.0% | 0.2000 | 50.0% |" in table
    assert _evaluation()["nll_by_position"] == {DENSE: [2.0, 2.0]}
    pytest.importorskip("matplotlib")
    for image in report.plots(_evaluation(), tmp_path / "eval"):
        assert image.stat().st_size > 1000


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--methods", "NOPE"], "unknown NOPE"),
        (["--depths", "1.5"], "between 0 and 1"),
        (["--budgets", "8"], "at least 64"),
        (["--passkey", "-1"], r"--passkey is \[-1\]"),
        (["--corpus", "/nowhere"], "/nowhere does not exist"),
    ],
)
def test_bad_arguments_are_named(flags: list[str], words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 8192}))
    with pytest.raises(UserError, match=words):
        eval_command.main([str(tmp_path), *flags])
