"""A replica checks per-request options, wherever Ray made its configuration."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray", reason="Ray is not installed: scripts/setup.sh ray")
pytest.importorskip("vllm")

from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine

from deploy.ray.app import ExtVLLMEngine


def _unpickled_config() -> Any:
    """As much as is read of a configuration that no platform of this process has seen."""
    return SimpleNamespace(
        device_config=SimpleNamespace(device_type="cpu"),
        parallel_config=SimpleNamespace(world_size=2),
    )


def test_a_configuration_made_elsewhere_is_prepared_here(monkeypatch: pytest.MonkeyPatch) -> None:
    config = _unpickled_config()
    seen: list[tuple[Any, str]] = []
    monkeypatch.setattr(
        VLLMEngine, "_prepare_engine_config", lambda self, context: ("a", "f", config)
    )
    monkeypatch.setattr("deploy.ray.app.prepare_config", lambda *given: seen.append(given))
    engine = ExtVLLMEngine.__new__(ExtVLLMEngine)
    assert engine._prepare_engine_config(None) == ("a", "f", config)
    assert seen == [(config, "cpu")]
