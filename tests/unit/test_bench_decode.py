"""``vllm-ext bench decode``: shapes, cells, memory and arms; no engine is started here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from attn_backends.adapter.speculation import speculative_arguments
from attn_backends.config import SettingError
from attn_backends.method import Geometry
from attn_backends.methods import REGISTRY, load_method
from attn_backends.plan import CHOOSING_ROLES, LayerRole
from vllm_ext.bench import decode, decode_report
from vllm_ext.bench.decode_memory import ENGINE_BYTES, GpuMemory, pool_bytes, weights_bytes
from vllm_ext.bench.decode_workload import Cell, Workload, parse_cells
from vllm_ext.bench.shapes import (
    SHAPES,
    default_anchor_layers,
    reads_anchors,
    write_model,
    write_profile,
)
from vllm_ext.cli import main
from vllm_ext.engine_process import Drafts
from vllm_ext.errors import UserError

GIB = 1 << 30
STOCK = decode.Arm("stock", "stock", {})
TIDAL = decode.Arm("TIDAL_DECODE", "TIDAL_DECODE", {})


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # as their model cards count them
        ("demo", 134_515_008),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.1-8b", 8_030_261_248),
        ("qwen3-8b", 8_190_735_360),
    ],
)
def test_a_shape_is_the_model_that_it_is_named_after(
    name: str, parameters: int, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    shape = SHAPES[name]
    for num_layers in (shape.num_hidden_layers, 3):
        write_model(tmp_path, shape, num_layers, positions=1 << 20)
        config = transformers.AutoConfig.from_pretrained(tmp_path)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        assert model.num_parameters() == shape.num_parameters(num_layers)
        assert config.rope_parameters["rope_theta"] == shape.rope_theta
        assert config.dtype == torch.bfloat16
        assert config.max_position_embeddings == 1 << 20
    assert shape.num_parameters(shape.num_hidden_layers) == parameters


def test_every_shape_is_tested() -> None:
    assert [*SHAPES] == ["demo", "llama-3.2-1b", "llama-3.1-8b", "qwen3-8b"]


def _model(folder: Path, num_layers: int = 16) -> Path:
    write_model(folder, SHAPES["llama-3.1-8b"], num_layers, 0)
    return folder


def test_layer_roles_reach_every_method_that_reads_anchors(tmp_path: Path) -> None:
    folder = _model(tmp_path)
    write_profile(tmp_path / "profile.json", folder, [0], [1, 8])
    geometry = Geometry(16, 8, 32, 128, 16, 8, 4096, str(folder))
    readers = [name for name in REGISTRY if reads_anchors(name)]
    assert "TIDAL_DECODE" in readers
    for name in readers:
        method = load_method(name)
        config = method.config_cls(profile=str(tmp_path / "profile.json"))  # type: ignore[call-arg]
        schedule = method.schedule(config, geometry)
        assert schedule.of_role(LayerRole.DENSE) == (0,)
        assert schedule.of_role(*CHOOSING_ROLES) == (1, 8)


def test_layer_roles_that_the_model_does_not_have_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"anchor_layers has \[16\]; layers are 0 to 15"):
        write_profile(tmp_path / "profile.json", _model(tmp_path), [0], [1, 16])
    with pytest.raises(UserError, match=r"layers \[0\] come before the first anchor"):
        write_profile(tmp_path / "profile.json", _model(tmp_path), [], [1, 8])


def test_uncalibrated_anchors_are_those_of_the_first_measurement() -> None:
    assert default_anchor_layers(16) == (1, 8)
    assert default_anchor_layers(4) == (1,)


def test_cells_are_read_with_k_as_1024() -> None:
    assert parse_cells("8x32k, 1x500") == (Cell(8, 32768), Cell(1, 500))
    for text in ("8", "8x", "0x5", "8x32k,", "8x0k", "8x32m"):
        with pytest.raises(UserError, match=r"REQUESTSxCONTEXT.*8x32k,1x64k works"):
            parse_cells(text)


def _workload(folder: Path, *cells: Cell, num_layers: int = 16) -> Workload:
    parameters = SHAPES["llama-3.1-8b"].num_parameters(num_layers)
    return Workload(
        str(_model(folder, num_layers)),
        cells or (Cell(8, 32768), Cell(1, 65536)),
        "auto",
        long_tokens=136,
        random_parameters=parameters,
    )


def test_an_engine_needs_weights_keys_of_the_largest_cell_and_workspace(tmp_path: Path) -> None:
    workload = _workload(tmp_path)
    token_bytes = 16 * 2 * 8 * 128 * 2
    assert pool_bytes(workload) == (8 * (32768 + 136 + 256) + 256) * token_bytes
    assert weights_bytes(workload) == 2 * SHAPES["llama-3.1-8b"].num_parameters(16)
    fp32 = replace(workload, dtype="float32")
    assert pool_bytes(fp32) == 2 * pool_bytes(workload)
    assert weights_bytes(fp32) == 2 * weights_bytes(workload)
    needed = pool_bytes(workload) + weights_bytes(workload) + ENGINE_BYTES
    assert GpuMemory(79 * GIB, 2 * needed).engine_share(workload) == 0.5
    assert GpuMemory(int(2 * needed / 0.96), 140 * GIB).engines_at_once(workload) == 2
    assert GpuMemory(2 * needed, 140 * GIB).engines_at_once(workload) == 1  # no room to spare


def test_weights_of_a_folder_are_its_files(tmp_path: Path) -> None:
    workload = replace(_workload(tmp_path), random_parameters=None)
    for name in ("a.safetensors", "b.safetensors", "c.bin"):
        (tmp_path / name).write_bytes(b"12345")
    assert weights_bytes(workload) == 10


def test_a_cell_that_cannot_fit_is_refused_with_what_would(tmp_path: Path) -> None:
    workload = _workload(tmp_path, Cell(1, 4096), Cell(8, 131072), num_layers=32)
    with pytest.raises(UserError) as error:
        GpuMemory(138 * GIB, 140 * GIB).engines_at_once(workload)
    assert "8 x 131072 tokens need 128.4 GiB of keys and values" in str(error.value)
    assert "at most 7 such requests fit" in str(error.value)
    with pytest.raises(UserError, match="not one such request fits"):
        GpuMemory(22 * GIB, 24 * GIB).engines_at_once(workload)


def test_contexts_are_distinct_and_new_in_every_round_where_ttft_is_timed() -> None:
    cell = Cell(2, 50)
    workload = Workload("model", (cell,), "auto")
    one, other = workload.prompts(cell, 0)
    assert one != other
    assert workload.prompts(cell, 1) == [one, other]
    timed = replace(workload, times_ttft=True)
    assert timed.prompts(cell, 0) == timed.prompts(cell, 0) != timed.prompts(cell, 1)


def test_an_arm_gets_what_is_meant_for_it(tmp_path: Path) -> None:
    workload = replace(_workload(tmp_path), profile="p.json", compilation_config={"mode": 0})
    settings = {"budget_tokens": 3072, "window_tokens": 64}
    stock = decode.engine_arguments(STOCK, workload, settings, 0.25)
    assert stock["gpu_memory_utilization"] == 0.25
    assert stock["load_format"] == "dummy"
    assert stock["compilation_config"] == {"mode": 0}
    assert stock["max_model_len"] == 65536 + 136 + 64
    assert "attention_backend" not in stock
    assert "additional_config" not in stock
    tidal = decode.engine_arguments(TIDAL, workload, settings, None)
    ours = {"budget_tokens": 3072, "profile": "p.json"}
    assert tidal["additional_config"] == {"vllm_ext": ours}
    assert tidal["attention_backend"] == "TIDAL_DECODE"
    assert "gpu_memory_utilization" not in tidal
    window = decode.Arm("w", "SINK_WINDOW", {"sink_tokens": 4})
    window_tidal = decode.engine_arguments(window, workload, settings, None)
    assert window_tidal["additional_config"] == {
        "vllm_ext": {"window_tokens": 64, "sink_tokens": 4}
    }


class _FakeEngine:
    """Knows which engines are alive, and answers in a time that tells them apart."""

    alive: ClassVar[list[str]] = []
    most_alive = 0

    def __init__(self, name: str, engine: dict[str, Any], env: dict[str, str | None]) -> None:
        self.name = name
        self.drafts = Drafts(0, ())
        self.alive.append(name)
        type(self).most_alive = max(self.most_alive, len(self.alive))

    def generate(self, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
        step_s = 0.004 if self.name == "stock" else 0.002
        prefill_s = 0.5 if max_tokens == 1 else 0.01
        if "lossless" in self.name:
            self.drafts = Drafts(self.drafts.num_drafts + 10, (9, 8 * (self.drafts.num_drafts > 0)))
        return {"seconds": prefill_s + step_s * max_tokens}

    def close(self) -> None:
        self.alive.remove(self.name)


@pytest.fixture
def _fake_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_FakeEngine, "alive", [])
    monkeypatch.setattr(_FakeEngine, "most_alive", 0)
    monkeypatch.setattr(decode, "EngineProcess", _FakeEngine)


@pytest.mark.usefixtures("_fake_engines")
@pytest.mark.parametrize("fitting", [1, 2])
def test_arms_alternate_where_they_fit_and_the_report_says_so(
    fitting: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = replace(_workload(tmp_path, Cell(2, 100)), rounds=2, times_ttft=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(GpuMemory, "now", lambda: GpuMemory(100 * GIB, 100 * GIB))
    monkeypatch.setattr(GpuMemory, "engines_at_once", lambda self, of: fitting)
    result = decode.run(workload, [STOCK, TIDAL], {"budget_tokens": 3072}, lambda line: None)
    assert _FakeEngine.most_alive == fitting
    assert _FakeEngine.alive == []
    assert result["alternated"] == (fitting == 2)
    assert result["arm_settings"]["TIDAL_DECODE"]["budget_tokens"] == 3072
    json.dumps(result)
    table = decode_report.markdown(result)
    assert ("alternating rounds" in table) == (fitting == 2)
    assert ("one arm after another" in table) == (fitting == 1)
    assert "driver" in table
    assert "budget_tokens 3072" in table
    row = next(line for line in table.splitlines() if "TIDAL_DECODE |" in line)
    assert "| 2 x 100 | TIDAL_DECODE | 2.00 | 0.500 | 0.500 to 0.500 | 2.00 | 502.0 |" in row


@pytest.mark.usefixtures("_fake_engines")
def test_an_arm_that_drafts_reports_what_was_accepted(tmp_path: Path) -> None:
    workload = replace(_workload(tmp_path, Cell(2, 100)), rounds=1)
    settings = {"lossless_tokens": 2}
    arm = decode.Arm("lossless", "TIDAL_DECODE", settings)
    speculation = decode.engine_arguments(arm, workload, {}, None)["speculative_config"]
    assert speculation == speculative_arguments(workload.model, 2)
    assert "speculative_config" not in decode.engine_arguments(TIDAL, workload, {}, None)
    result = decode.run(workload, [STOCK, arm], {}, lambda line: None)
    assert result["cells"][0]["arms"]["lossless"]["accepted"] == [0.0, 0.4]
    table = decode_report.markdown(result)
    assert "| 0.00 0.40 |" in table
    assert "| stock | 4.00 | 1.000 | 1.000 to 1.000 | 1.00 | - |" in table


@pytest.mark.usefixtures("_fake_engines")
def test_settings_that_a_method_refuses_are_named_before_an_engine_starts(tmp_path: Path) -> None:
    bad = decode.Arm("bad", "TIDAL_DECODE", {"sink_tokens": -1})
    with pytest.raises(SettingError, match="sink_tokens is -1"):
        decode.run(_workload(tmp_path), [STOCK, bad], {}, lambda line: None)
    assert _FakeEngine.most_alive == 0


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--layers", "2"], ["--layers", "--shape"]),
        (["--shape", "llama-3.1-8b", "--layers", "0"], ["--layers", "0", "at least 1"]),
        (["--shape", "demo", "--cells", "8x"], ["--cells", "8x"]),
        (["--shape", "demo", "--compilation-config", "{"], ["--compilation-config", "JSON"]),
        (["--shape", "demo", "--compilation-config", "3"], ["--compilation-config", "object"]),
        (["--shape", "demo", "--anchor-layers", "1"], ["--anchor-layers", "stock", "TIDAL_DECODE"]),
        (
            ["--shape", "demo", "--arms", "stock,TIDAL_DECODE", "--anchor-layers", "1,99"],
            ["anchor_layers", "99", "0 to 29"],
        ),
        (
            ["--shape", "demo", "--arms", "TIDAL_DECODE", "--anchor-layers", "1", "--profile", "p"],
            ["--anchor-layers", "--profile"],
        ),
        (["--model", "nowhere"], ["nowhere", "demo-model", "--shape"]),
    ],
)
def test_user_errors_are_one_line_and_exit_2(
    argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "decode", *argv]) == 2
    message = capsys.readouterr().err
    assert len(message.strip().splitlines()) == 1
    for word in words:
        assert word in message


@pytest.mark.usefixtures("_fake_engines")
def test_a_shape_needs_no_model_and_no_calibration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--shape", "llama-3.1-8b", "--layers", "16", "--arms", "stock,TIDAL_DECODE"]
    words += ["--cells", "2x100", "--rounds", "1", "--output", str(tmp_path / "decode")]
    assert main(["bench", "decode", *words]) == 0
    result = json.loads((tmp_path / "decode.json").read_text())
    title = "llama-3.1-8b with 16 layers of random weights, dense layers [0], anchors [1, 8]"
    assert result["workload"]["model"] == title
    assert title in (tmp_path / "decode.md").read_text()
    assert "profile" not in result["arm_settings"]["TIDAL_DECODE"]
    capsys.readouterr()
