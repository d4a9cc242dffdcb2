"""Unsupported set-ups: refused when strict, served dense and counted when not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.engine import run_engine
from vllm_ext.cli.doctor import TINY_LLAMA
from vllm_ext.errors import UserError

pytestmark = pytest.mark.e2e

JOB = {"prompts": [list(range(3, 300)), list(range(5, 40))], "together": True, "max_tokens": 6}


@pytest.fixture
def engine(tmp_path: Path) -> dict[str, Any]:
    """An engine on a tiny random model whose own layers have a sliding window."""
    config = TINY_LLAMA | {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": 128,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return {
        "model": str(tmp_path),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "kv_cache_memory_bytes": 64 << 20,
        "max_model_len": 1024,
        "attention_backend": "SINK_WINDOW",
    }


def test_strict_refuses_and_names_it(engine: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="does not support sliding-window layers of the model"):
        run_engine(engine, [JOB])


def test_not_strict_serves_dense_and_counts_every_row(engine: dict[str, Any]) -> None:
    engine["additional_config"] = {"vllm_ext": {"strict": False}}
    answer = run_engine(engine, [JOB])
    assert [len(a["tokens"]) for a in answer["jobs"][0]] == [6, 6]
    assert answer["rows"] == {"SINK_WINDOW|dense|unsupported": 10}


def test_what_only_the_start_can_see_is_served_dense_too(engine: dict[str, Any]) -> None:
    """The model has nothing against us, the worker is not ours."""
    Path(engine["model"], "config.json").write_text(json.dumps(TINY_LLAMA))
    engine["additional_config"] = {"vllm_ext": {"strict": False}}
    engine["worker_cls"] = "tests.e2e.other_worker.OtherWorker"
    answer = run_engine(engine, [JOB])
    assert answer["rows"] == {"SINK_WINDOW|dense|unsupported": 10}
