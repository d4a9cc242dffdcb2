"""FLUX's calibration on a tiny random Llama: routed answers and evidence against naive readings."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch

from kvcache.spans import Span
from vllm_ext.calibration.routed import RoutedModel
from vllm_ext.calibration.routed_attention import POOLED_QUERIES, Prompted

SPAN = Span(4, 16)
LAYERS, HEADS, KV_HEADS = 4, 6, 2
LENGTHS_TOKENS = (120, 75)
ANSWER_TOKENS = 7


@pytest.fixture(scope="module")
def naive() -> Any:
    """transformers' own attention, with masks ``naive.masks[layer]`` added."""
    from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=96,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=16,
        vocab_size=211,
        initializer_range=0.3,  # attention that is not flat
    )
    model: Any = LlamaForCausalLM(config).eval()

    def attend(
        module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **kwargs: Any
    ) -> Any:
        group = query.shape[1] // key.shape[1]
        keys, values = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        visible = model.visible[module.layer_idx]
        logits = (query @ keys.mT * scaling).masked_fill(~visible, -torch.inf)
        weights = logits.softmax(-1)
        model.weights[module.layer_idx] = weights[0]
        return (weights @ values).transpose(1, 2), None

    AttentionInterface.register("naive", attend)
    model.set_attn_implementation("naive")
    model.weights = {}
    return model


@pytest.fixture(scope="module")
def routed(naive: Any) -> RoutedModel:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(deepcopy(naive.config))
    model.load_state_dict(naive.state_dict())
    return RoutedModel(model, SPAN)


def _prompt(num_tokens: int) -> list[int]:
    source = torch.Generator().manual_seed(num_tokens)
    ids: list[int] = torch.randint(0, 211, (num_tokens,), generator=source).tolist()
    return ids


@cache
def _masks(size: int, prompt_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of full and of sparse layers, which hide the gap from rows after the prompt."""
    causal, sparse = (torch.zeros(size, size, dtype=torch.bool) for _ in range(2))
    for p in range(size):
        for t in range(p + 1):
            causal[p, t] = True
            sparse[p, t] = p < prompt_tokens or t < 4 or t > p - 16
    return causal, sparse


@torch.no_grad()
def _naive_logits(naive: Any, ids: list[int], prompt_tokens: int, route: list[bool]) -> Any:
    """``[tokens, vocabulary]``."""
    causal, sparse = _masks(len(ids), prompt_tokens)
    naive.visible = [causal if full else sparse for full in route]
    return naive(input_ids=torch.tensor([ids])).logits[0]


def _routes() -> torch.Tensor:
    return torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 1], [0, 1, 1, 0]]).bool()


def _answered(routed: RoutedModel) -> tuple[Prompted, torch.Tensor]:
    prompted = Prompted.stacked([routed.prefill(_prompt(n))[0] for n in LENGTHS_TOKENS])
    dense = torch.ones(len(LENGTHS_TOKENS), 1, LAYERS, dtype=torch.bool)
    return prompted, routed.respond(prompted, dense, ANSWER_TOKENS)[:, 0]


def test_variants_are_compared_as_whole_passes_would(naive: Any, routed: RoutedModel) -> None:
    prompted, answers = _answered(routed)
    routes = _routes()
    kl, agrees = routed.compare(prompted, answers, routes.expand(len(answers), -1, -1))
    assert float(kl[:, 0].abs().max()) < 1e-5  # all layers full
    assert agrees[:, 0].all()
    assert float(kl[:, 1].max()) > 0.01  # hiding changes something
    for number, length in enumerate(LENGTHS_TOKENS):
        ids = _prompt(length) + answers[number].tolist()
        rows = slice(length, length + ANSWER_TOKENS)
        dense = _naive_logits(naive, ids, length, [True] * LAYERS)[rows].log_softmax(-1)
        assert dense[:-1].argmax(-1).tolist() == answers[number, 1:-1].tolist()
        for variant, route in enumerate(routes.tolist()):
            given = _naive_logits(naive, ids, length, route)[rows].log_softmax(-1)
            expected = (dense.exp() * (dense - given)).sum(-1)
            torch.testing.assert_close(kl[number, variant], expected, atol=1e-5, rtol=1e-3)
            agreed = dense.argmax(-1) == given.argmax(-1)
            assert agrees[number, variant].tolist() == agreed.tolist()


def test_greedy_answers_follow_their_routes(naive: Any, routed: RoutedModel) -> None:
    prompted, answers = _answered(routed)
    routes = _routes()
    given = routed.respond(prompted, routes.expand(len(answers), -1, -1), ANSWER_TOKENS)
    assert given[:, 0].tolist() == answers.tolist()
    for number, length in enumerate(LENGTHS_TOKENS):
        for variant, route in enumerate(routes.tolist()):
            ids = _prompt(length)
            for _ in range(ANSWER_TOKENS + 1):
                ids.append(int(_naive_logits(naive, ids, length, route)[-1].argmax()))
            assert given[number, variant].tolist() == ids[length:]


def test_evidence_is_the_mass_that_a_sparse_layer_would_not_see(
    naive: Any, routed: RoutedModel
) -> None:
    ids = _prompt(LENGTHS_TOKENS[0])
    _, evidence = routed.prefill(ids)
    pooled = []
    hook = naive.model.layers[2].self_attn.q_proj.register_forward_hook(
        lambda module, args, out: pooled.append(out[0])
    )
    _naive_logits(naive, ids, len(ids), [True] * LAYERS)
    hook.remove()
    for layer in range(LAYERS):
        for head in range(HEADS):
            masses = [
                sum(float(naive.weights[layer][head, p, t]) for t in range(4, p - 16 + 1))
                for p in range(len(ids) - 32, len(ids))
            ]
            assert float(evidence.gap_mean[layer, head]) == pytest.approx(
                sum(masses) / 32, rel=1e-4
            )
            assert float(evidence.gap_max[layer, head]) == pytest.approx(max(masses), rel=1e-4)
            assert float(evidence.gap_last[layer, head]) == pytest.approx(masses[-1], rel=1e-4)
    query = pooled[0].unflatten(-1, (HEADS, 16)).mean(1)
    expected = torch.cat([query[:POOLED_QUERIES].mean(0), query[-POOLED_QUERIES:].mean(0)])
    torch.testing.assert_close(evidence.pooled_query[2], expected)
