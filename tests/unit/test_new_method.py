"""A method is one module and one line: everything else that the product has of it follows."""

from __future__ import annotations

from pathlib import Path

import pytest

from attn_backends.methods import REGISTRY, load_method
from deploy.loadtest import __main__ as loadtest
from deploy.loadtest import grid
from deploy.observability.queries import DASHBOARD
from tests.toy_method import LINE, METHOD, NAME, ToyConfig
from vllm_ext.cli import eval as eval_command
from vllm_ext.cli import main
from vllm_ext.cli.bench import parse_arm
from vllm_ext.cli.methods import MARKERS, with_table
from vllm_ext.evaluation.run import Column, make_columns

pytestmark = pytest.mark.usefixtures("_one_more_line")


@pytest.fixture
def _one_more_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REGISTRY, NAME, LINE)


def _help(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    return " ".join(capsys.readouterr().out.split())


def test_it_is_a_choice_of_serve_with_flags_of_its_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = _help("serve", capsys)
    assert f"{NAME}, or any backend of vLLM" in text
    flag = "--toy-dense-layers INT first layers that read everything (default 3, 1 to 1048576)"
    assert f"settings of {NAME}: {flag}" in text
    assert main(["serve", "nowhere/at/all", "--attention-backend", NAME]) == 2


def test_its_settings_are_checked_as_all_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    words = ["--attention-backend", NAME, "--toy-dense-layers", "0", "--uds", "s"]
    assert main(["serve", str(tmp_path), *words]) == 2
    assert "vllm_ext.toy_dense_layers is 0" in capsys.readouterr().err


def test_it_has_a_backend() -> None:
    pytest.importorskip("vllm")
    from attn_backends.adapter import backend

    made = backend._make_backend(NAME)
    assert made.get_name() == NAME
    assert made.get_builder_cls().METHOD is METHOD
    assert backend.class_path(NAME) == f"attn_backends.adapter.backend.{NAME}"


def test_eval_has_a_column_for_each_budget_without_being_asked() -> None:
    default = eval_command._parser().parse_args(["MODEL"]).methods.split(",")
    assert NAME in default
    columns = make_columns(default, [256, 512], {"toy_dense_layers": 1, "window_tokens": 64})
    own = [column for column in columns if column.method == NAME]
    settings = {"toy_dense_layers": 1}
    assert own == [
        Column(f"{NAME}@{budget}", NAME, settings, {"budget_tokens": budget})
        for budget in (256, 512)
    ]


def test_it_is_an_arm_of_benchmarks_and_load_tests() -> None:
    arm = parse_arm(f"{NAME}:toy_dense_layers=1")
    assert (arm.engine, arm.settings) == (NAME, {"toy_dense_layers": 1})
    for size in (["--small"], []):
        args = loadtest._parser().parse_args(["--start", *size, "--toy-dense-layers", "2"])
        cell = grid.Cell(grid.DISTINCT, 512, 32, 1, 1)
        arms = {arm.name: arm for arm in loadtest.started_arms(args, [cell])}
        words = " ".join(arms[NAME].serve_words or ())
        assert f"--attention-backend {NAME} --toy-dense-layers 2" in words
        assert "toy" not in " ".join(arms["SINK_WINDOW"].serve_words or ())


def test_it_has_its_row_in_the_docs(capsys: pytest.CaptureFixture[str]) -> None:
    page = with_table(f"{MARKERS[0]}{MARKERS[1]}")
    limits = METHOD.capabilities
    row = f"| `{NAME}` | {METHOD.summary} | {limits.reads} | {limits.frees} | {limits.limits} |"
    assert row in page.splitlines()
    assert main(["methods"]) == 0
    assert f"{NAME:<14}{METHOD.summary}" in capsys.readouterr().out


def test_messages_that_say_which_methods_would_work_name_it() -> None:
    pytest.importorskip("vllm")
    from attn_backends.adapter.requests import parse_options

    with pytest.raises(ValueError, match=f"methods that do: .*{NAME}"):
        parse_options({"sparse": "off"}, load_method("SINK_WINDOW"), 1)
    options = parse_options({"budget_tokens": 512}, load_method(NAME), ToyConfig().sink_tokens)
    assert options is not None


def test_the_dashboard_shows_whatever_method_there_is() -> None:
    text = DASHBOARD.read_text()
    assert "{{method}}" in text
    assert [name for name in REGISTRY if name in text] == []
