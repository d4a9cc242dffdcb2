"""Calibration on a tiny random Llama: the search is exact, the simulation agrees with dense."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from attn_backends.plan import LayerRole
from vllm_ext.calibration.data import FORCED_TOKENS, Example, make_examples
from vllm_ext.calibration.probe import Budget, Probe
from vllm_ext.calibration.search import (
    Verdict,
    best_anchor_sets,
    make_schedule,
    record,
    search,
    similarity,
    verify,
)


def test_dynamic_programming_finds_what_brute_force_finds() -> None:
    torch.manual_seed(1)
    scores, first, count = torch.rand(9, 9), 2, 3

    def value(anchors: tuple[int, ...]) -> float:
        total = 0.0
        for layer in range(first, 9):
            anchor = max(a for a in anchors if a <= layer)
            total += 0.0 if anchor == layer else float(scores[anchor, layer])
        return total

    sets = [(first, *rest) for rest in itertools.combinations(range(first + 1, 9), count - 1)]
    expected = sorted(sets, key=value, reverse=True)[:4]
    assert best_anchor_sets(scores, count, first, 4) == expected


def test_search_moves_anchors_while_that_helps() -> None:
    def judge(anchors: tuple[int, ...]) -> Verdict:
        return Verdict(anchors, abs(anchors[1] - 7) * 0.1, 0.0, 1.0)

    best, seen = search([(2, 4)], 12, judge, 50, lambda line: None)
    assert best.anchors == (2, 7)
    assert len({verdict.anchors for verdict in seen}) == len(seen)
    _, few = search([(2, 4)], 12, judge, 3, lambda line: None)
    assert len(few) == 3


@pytest.fixture(scope="module")
def probe() -> Probe:
    return Probe(Budget(block_size=16, budget_blocks=3, sink_blocks=1, recent_blocks=1))


@pytest.fixture(scope="module")
def model(probe: Probe) -> Any:
    from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    AttentionInterface.register("vllm_ext_probe", probe.attend)
    config = LlamaConfig(
        hidden_size=96,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=211,
        attn_implementation="vllm_ext_probe",
    )
    return LlamaForCausalLM(config).eval()


def _example(num_tokens: int = 200) -> Example:
    source = torch.Generator().manual_seed(3)
    return Example("text", torch.randint(0, 211, (num_tokens,), generator=source).tolist())


def test_the_probe_attends_like_the_model_itself(model: Any, probe: Probe) -> None:
    ids = torch.tensor([_example().ids])
    with torch.no_grad():
        probed = model(input_ids=ids).logits
        model.set_attn_implementation("eager")
        expected = model(input_ids=ids).logits
        model.set_attn_implementation("vllm_ext_probe")
    torch.testing.assert_close(probed, expected, atol=1e-4, rtol=1e-4)


def test_recorded_mass_is_a_share_of_every_head(model: Any, probe: Probe) -> None:
    recording = record(model, probe, _example())
    sums = recording.mass.sum(-1)  # one per query head of the group
    torch.testing.assert_close(sums, torch.full_like(sums, 3.0), atol=1e-4, rtol=1e-4)
    pairs = similarity(recording, probe)
    own = torch.stack([pairs[layer, layer].diagonal() for layer in range(4)])
    torch.testing.assert_close(own, torch.ones_like(own))
    assert float(pairs.max()) <= 1 + 1e-4


def test_a_full_budget_is_dense_and_a_small_one_is_not(model: Any, probe: Probe) -> None:
    recording = record(model, probe, _example())
    pairs = similarity(recording, probe)
    schedule = make_schedule((1,), pairs, first_layer=1)
    assert [role is LayerRole.REUSE for role in schedule.roles] == [False, False, True, True]
    small = verify(model, probe, schedule, [recording])
    assert recording.cache.get_seq_length() == 200 - FORCED_TOKENS - 1
    probe.budget = Budget(16, 100, 1, 1)
    full = verify(model, probe, schedule, [recording])
    assert abs(full.kl_text) < 1e-5
    assert full.agreement == 1.0
    assert small.kl_text > 10 * abs(full.kl_text)


def test_examples_are_the_same_for_the_same_seed() -> None:
    def tokenizer(text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}

    first = make_examples(tokenizer, 7, None, 800, 2)
    assert first == make_examples(tokenizer, 7, None, 800, 2)
    assert first != make_examples(tokenizer, 8, None, 800, 2)
    assert [example.kind for example in first] == ["retrieval"] * 2 + ["text"] * 2
