"""MOA's calibration: influence against the loss itself, assignment, and the report."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvcache.spans import Span
from vllm_ext.calibration.influence import Influence


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, hidden: torch.Tensor | None
) -> torch.Tensor:
    """Plain causal attention; ``hidden``: bool, of one KV head's queries and keys."""
    num_tokens, group = query.shape[1], query.shape[0] // key.shape[0]
    keys, values = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
    logits = query @ keys.transpose(1, 2) * query.shape[-1] ** -0.5
    future = torch.ones(num_tokens, num_tokens, dtype=torch.bool).triu(1)
    logits = logits.masked_fill(future, -torch.inf)
    if hidden is not None:
        logits[:group] = logits[:group].masked_fill(hidden, -torch.inf)
    return logits.softmax(-1) @ values


def test_gradients_are_those_of_attention() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(n, 40, 8, requires_grad=True) for n in (4, 2, 2))
    weight = torch.randn(4, 40, 8)
    influence = Influence([Span(2, 4)], 1, 2)
    out, _ = influence.attend(
        SimpleNamespace(layer_idx=0), query[None], key[None], value[None], None
    )
    torch.autograd.backward((out[0].transpose(0, 1) * weight).sum())
    found = [tensor.grad.clone() for tensor in (query, key, value) if tensor.grad is not None]
    wanted = torch.autograd.grad(
        (_attention(query, key, value, None) * weight).sum(), (query, key, value)
    )
    torch.testing.assert_close(found, list(wanted))


def test_influence_is_the_change_of_the_loss_where_that_is_linear() -> None:
    """A loss that is linear in one query's output: to first order is then exactly."""
    torch.manual_seed(1)
    query, key, value = (torch.randn(n, 30, 8) for n in (2, 1, 1))
    for tensor in (query, key, value):
        tensor.requires_grad_()
    span, asked = Span(3, 5, alpha_tokens=0, beta_64ths=16), 27
    weight = torch.zeros(2, 30, 8)
    weight[:, asked] = torch.randn(2, 8)
    influence = Influence([Span(0, 64), span], 1, 1)
    out, _ = influence.attend(
        SimpleNamespace(layer_idx=0), query[None], key[None], value[None], None
    )
    torch.autograd.backward((out[0].transpose(0, 1) * weight).sum())
    hidden = torch.zeros(30, 30, dtype=torch.bool)
    hidden[asked, 3 : span.first_seen(asked + 1)] = True
    assert hidden.any()
    with torch.no_grad():
        change = (
            _attention(query, key, value, hidden) - _attention(query, key, value, None)
        ) * weight
    found = influence.change[0, 0]
    assert found[0] == 0  # hides nothing
    torch.testing.assert_close(float(found[1]), float(change.sum()), rtol=1e-4, atol=1e-6)


def test_heads_get_spans_within_the_budget_and_in_whole_groups() -> None:
    pytest.importorskip("scipy")
    import numpy as np

    from attn_backends.head_classes import require_unpadded
    from vllm_ext.calibration.assignment import Program, assign, density_of

    rules = [Span(64, 128, 0, beta) for beta in (0, 8, 16, 32, 64)]
    lengths = (1024, 4096)
    densities = np.array([[density_of(rule, n) for rule in rules] for n in lengths])
    importance = np.random.default_rng(0).lognormal(0, 2, 30)
    costs = importance[:, None] * (1 - densities[1])[None]
    chosen = assign(Program(costs, densities, 0.5, 5))
    counts = [chosen.count(rule) for rule in {*chosen}]
    require_unpadded(counts)
    assert all(count % 5 == 0 for count in counts)
    for length in densities:
        assert sum(length[rule] for rule in chosen) / 30 <= 0.5 + 1e-9
    # Those that matter most keep most.
    kept = densities[1][chosen]
    order = importance.argsort()
    assert kept[order[-5:]].mean() > kept[order[:5]].mean()


def test_a_budget_that_no_plan_keeps_to_is_an_error() -> None:
    pytest.importorskip("scipy")
    import numpy as np

    from vllm_ext.calibration.assignment import Program, assign
    from vllm_ext.errors import UserError

    impossible: Any = Program(np.ones((4, 1)), np.array([[0.3], [0.9]]), 0.2, 3)
    with pytest.raises(UserError, match=r"--density is 0\.2; no assignment"):
        assign(impossible)


def test_a_rule_that_keeps_less_never_costs_less() -> None:
    import numpy as np

    from vllm_ext.calibration.plans import never_less

    costs = np.array([[3.0, 1.0, 2.0, 0.0], [0.5, 0.2, 0.1, 0.0]])
    found = never_less(costs, kept=np.array([0.2, 0.1, 0.5, 1.0]))
    np.testing.assert_array_equal(found, [[3.0, 3.0, 2.0, 0.0], [0.5, 0.5, 0.1, 0.0]])
