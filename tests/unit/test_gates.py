"""Gates of KV heads: what they mix, and that those which the answers need stay open."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from kvcache.spans import Span
from vllm_ext.calibration import gates as gating
from vllm_ext.calibration.gates import Gates, Sample, learn, starting_gates
from vllm_ext.calibration.plans import opened
from vllm_ext.calibration.spanned import SpannedModel, attend_span

SPAN = Span(2, 6, 0, 8)
LAYER = SimpleNamespace(layer_idx=0)


def _heads(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value of four query heads and two KV heads."""
    torch.manual_seed(0)
    return (
        torch.randn(1, 4, num_tokens, 8),
        torch.randn(1, 2, num_tokens, 8),
        torch.randn(1, 2, num_tokens, 8),
    )


def test_a_span_hides_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_ext.calibration.spanned.CHUNK_TOKENS", 16)
    query, key, value = _heads(40)
    seen = torch.tensor(
        [[t <= p and (t < 2 or t >= SPAN.first_seen(p + 1)) for t in range(40)] for p in range(40)]
    )
    wanted = scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=True)
    torch.testing.assert_close(attend_span(query, key, value, SPAN, None), wanted)


def test_gates_mix_everything_and_a_span() -> None:
    heads = _heads(40)
    whole = scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
    narrow = attend_span(*heads, SPAN, None)
    found, _ = Gates(SPAN, torch.tensor([[40.0, 0.0]])).attend(LAYER, *heads, None)
    found = found.transpose(1, 2)
    torch.testing.assert_close(found[:, :2], whole[:, :2])
    torch.testing.assert_close(found[:, 2:], (whole + narrow)[:, 2:] / 2)


class _OneLayer(SpannedModel):
    """A model of one layer whose next token depends on what its first KV head reads alone."""

    def __init__(self) -> None:
        self._attend: Callable[..., Any] | None = None
        self._heads = _heads(64)
        self.model = SimpleNamespace(device="cpu", model=self._run, lm_head=torch.nn.Linear(16, 5))
        self.model.lm_head.weight.data.mul_(8)
        self.model.lm_head.requires_grad_(False)

    def _run(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        assert self._attend is not None
        out, _ = self._attend(LAYER, *self._heads, None)
        return SimpleNamespace(last_hidden_state=out[:, :, :2].flatten(2))

    @contextmanager
    def attending(self, attend: Callable[..., Any]) -> Iterator[None]:
        self._attend = attend
        yield
        self._attend = None


def test_the_gate_stays_open_that_answers_need() -> None:
    model: Any = _OneLayer()
    whole = Gates(SPAN, torch.full((1, 2), 40.0))
    with model.attending(whole.attend), torch.no_grad():
        dense = model.last_logprobs([0] * 65, 8)
    sample = Sample("retrieval", [0] * 65, 8, dense)
    gates = Gates(SPAN, starting_gates(np.array([1.0, 1.0]), num_layers=1))
    steps: list[int] = []
    found = learn(model, gates, [sample], 0.5, seed=0, progress=lambda done, _: steps.append(done))
    assert found[0] > 0.7 > 0.3 > found[1]
    assert steps == list(range(gating.STEPS + 1))


def test_gates_begin_in_the_order_of_influence() -> None:
    start = starting_gates(np.array([1e-4, 3.0, 0.2, 0.0]), num_layers=2)
    assert start.shape == (2, 2)
    assert start.flatten().argsort().tolist() == [3, 0, 2, 1]
    assert float(start.max() - start.min()) <= 4


def test_heads_of_the_widest_gates_are_bound_to_the_last_rule() -> None:
    costs = np.array([[3.0, 0.0], [5.0, 0.0], [1.0, 0.0]])
    bound = opened(costs, [0.1, 0.2, 0.9], number=2)
    assert bound.argmin(1).tolist() == [0, 1, 1]
    assert bound.min(1).tolist() == [3.0, 0.0, 0.0]
