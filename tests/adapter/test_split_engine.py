"""What layers with heads of their own share lasts for one pass through the model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from attn_backends.adapter import entries
from attn_backends.adapter.entries import SplitEngine


def test_a_second_pass_with_the_same_metadata_writes_slots_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM warms up and captures pieces of a model with one plan: the graph must have them, too."""
    engine: Any = SplitEngine(SimpleNamespace(), 64)
    asked: list[Any] = []
    engine.add_group(["a"])
    engine._shared = SimpleNamespace(write_slots=lambda slots: asked.append(slots) or slots)
    contexts = [SimpleNamespace(slot_mapping={"a": number}) for number in range(2)]
    for context in contexts:
        monkeypatch.setattr(entries, "get_forward_context", lambda context=context: context)
        assert engine.slots() is engine.slots()
    assert asked == [[0], [1]]
