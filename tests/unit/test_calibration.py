"""Calibration on a tiny random Llama: the search is exact, the simulation agrees with dense."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from attn_backends.plan import LayerRole
from vllm_ext.calibration.anchors import AnchorSettings
from vllm_ext.calibration.data import Example, Sizes, make_examples
from vllm_ext.calibration.probe import Budget, Probe
from vllm_ext.calibration.search import (
    Verdict,
    best_anchor_sets,
    layer_errors,
    make_schedule,
    record,
    search,
    verify,
)
from vllm_ext.calibration.state import SavedState
from vllm_ext.errors import UserError


def test_dynamic_programming_finds_what_brute_force_finds() -> None:
    torch.manual_seed(1)
    costs, first, count = torch.rand(9, 9), 2, 3

    def cost(anchors: tuple[int, ...]) -> float:
        total = 0.0
        for layer in range(first, 9):
            anchor = max(a for a in anchors if a <= layer)
            total += float(costs[anchor, layer])
        return total

    sets = [(first, *rest) for rest in itertools.combinations(range(first + 1, 9), count - 1)]
    assert best_anchor_sets(costs, count, first, 4) == sorted(sets, key=cost)[:4]
    assert best_anchor_sets(costs, 8, first, 4) == []  # more anchors than layers


def test_search_moves_anchors_while_that_helps() -> None:
    def judge(anchors: tuple[int, ...]) -> Verdict:
        return Verdict(anchors, abs(anchors[1] - 7) * 0.1, 0.0, 1.0, 1.0)

    best, seen = search([(2, 4)], 12, judge, 50)
    assert best.anchors == (2, 7)
    assert len({verdict.anchors for verdict in seen}) == len(seen)
    _, few = search([(2, 4)], 12, judge, 3)
    assert len(few) == 3


def test_search_moves_one_anchor_after_another() -> None:
    def judge(anchors: tuple[int, ...]) -> Verdict:
        return Verdict(anchors, abs(anchors[1] - 6) + abs(anchors[2] - 8), 0.0, 1.0, 1.0)

    best, _ = search([(2, 4, 10)], 12, judge, 50)
    assert best.anchors == (2, 6, 8)  # neither anchor could get there alone


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


FORCED_TOKENS = 10


def _example(num_tokens: int = 200) -> Example:
    source = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 211, (num_tokens,), generator=source).tolist()
    return Example("text", ids, FORCED_TOKENS)


def test_the_probe_attends_like_the_model_itself(model: Any, probe: Probe) -> None:
    ids = torch.tensor([_example().ids])
    with torch.no_grad():
        probed = model(input_ids=ids).logits
        model.set_attn_implementation("eager")
        expected = model(input_ids=ids).logits
        model.set_attn_implementation("vllm_ext_probe")
    torch.testing.assert_close(probed, expected, atol=1e-4, rtol=1e-4)


def test_errors_of_reuse_are_those_of_attention_under_the_selection(
    model: Any, probe: Probe
) -> None:
    example = _example()
    errors = record(model, probe, example).errors
    assert errors.shape == (4, 4, 2, 2)
    assert errors[3, 1].isinf().all()
    assert errors[1, 3].isfinite().all()
    costs = layer_errors(errors)
    everything = Probe(Budget(16, 100, 1, 1))
    probe.budget, small = everything.budget, probe.budget
    full = record(model, probe, example).errors
    probe.budget = small
    assert float(full[full.isfinite()].max()) < 1e-9
    assert float(costs[0, 1]) > 1e-6


def test_a_chunk_under_a_schedule_equals_its_tokens_one_by_one(model: Any, probe: Probe) -> None:
    recording = record(model, probe, _example())
    probe.schedule = make_schedule((1,), recording.errors, first_layer=1)
    ids = torch.tensor([recording.example.ids[-FORCED_TOKENS - 1 : -1]])

    def run(chunks: list[torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            logits = [
                model(input_ids=chunk, past_key_values=recording.cache, use_cache=True).logits[0]
                for chunk in chunks
            ]
        recording.cache.crop(-FORCED_TOKENS)
        return torch.cat(logits)

    together, single = run([ids]), run(list(ids.split(1, dim=1)))
    probe.schedule = None
    torch.testing.assert_close(together, single, atol=1e-5, rtol=1e-4)


def test_a_full_budget_is_dense_and_a_small_one_is_not(model: Any, probe: Probe) -> None:
    recording = record(model, probe, _example())
    schedule = make_schedule((1,), recording.errors, first_layer=1)
    assert [role is LayerRole.REUSE for role in schedule.roles] == [False, False, True, True]
    small = verify(model, probe, schedule, [recording])
    assert recording.cache.get_seq_length() == 200 - FORCED_TOKENS - 1
    probe.budget, kept = Budget(16, 100, 1, 1), probe.budget
    full = verify(model, probe, schedule, [recording])
    probe.budget = kept
    assert abs(full.kl_text) < 1e-5
    assert full.agreement_text == 1.0
    assert small.kl_text > 10 * abs(full.kl_text)


def _letters(text: str) -> dict[str, list[int]]:
    """A tokenizer."""
    return {"input_ids": [ord(c) for c in text]}


def test_a_corpus_shorter_than_an_example_is_refused(tmp_path: Path) -> None:
    corpus = tmp_path / "short.txt"
    corpus.write_text("x" * 799)
    with pytest.raises(UserError, match=r"short.txt has 799 tokens, less than the 800"):
        make_examples(_letters, 7, corpus, Sizes(800, 2))
    corpus.write_text("x" * 800)
    assert len(make_examples(_letters, 7, corpus, Sizes(800, 2))) == 4


def test_examples_are_the_same_for_the_same_seed() -> None:
    sizes = Sizes(800, 2)
    first = make_examples(_letters, 7, None, sizes)
    assert first == make_examples(_letters, 7, None, sizes)
    assert first != make_examples(_letters, 8, None, sizes)
    assert [example.kind for example in first] == ["retrieval", "text"] * 2
    for example in first:
        assert len(example.ids) <= 800 + 200
        assert example.forced_tokens < len(example.ids)


def test_an_interrupted_calibration_goes_on(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "out" / "p.state.json"

    def trials(**settings: Any) -> SavedState:
        return SavedState(path, AnchorSettings(tmp_path, **settings).key())

    trials(seed=3).keep("(2, 5)", {"kl_text": 0.1})
    assert trials(seed=3).recall("(2, 5)") == {"kl_text": 0.1}
    assert trials(seed=3).recall("(2, 6)") is None
    assert len(trials(seed=3, drop=2)) == 1  # dropping judges no anchors
    assert len(trials(seed=4)) == 0
    trials(seed=3).forget()
    assert len(trials(seed=3)) == 0
