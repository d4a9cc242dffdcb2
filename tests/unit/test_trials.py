"""Trials of halves: ends read again say what whole prompts say, and the plan made of them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from kvcache.spans import Span
from vllm_ext.calibration.assignment import Program
from vllm_ext.calibration.data import asked_needles
from vllm_ext.calibration.ends import End, Ends, Reading, divergences, read
from vllm_ext.calibration.plans import halved
from vllm_ext.calibration.spanned import NAME, SpannedModel
from vllm_ext.calibration.trials import LEAST_DIVERGENCE, needs_of_everything

EVERYTHING, HALF, NARROW = Span(4, 8, 0, 64), Span(4, 8, 0, 32), Span(4, 8, 0, 4)


class _Tiny(SpannedModel):
    """Three layers of two KV heads, random weights."""

    def __init__(self) -> None:
        from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        self._attend: Any = self._dense
        AttentionInterface.register(NAME, lambda *args, **kwargs: self._attend(*args, **kwargs))
        config = LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            attn_implementation=NAME,
            initializer_range=0.5,
        )
        self.model = LlamaForCausalLM(config).eval().requires_grad_(False)
        self.layers = self.model.model.layers
        self.num_layers, self.num_kv_heads = 3, 2


@pytest.fixture(scope="module")
def model() -> SpannedModel:
    return _Tiny()


def _readings() -> list[Reading]:
    source = random.Random(3)

    def tokens(number: int) -> list[int]:
        return [source.randrange(50) for _ in range(number)]

    text = tokens(90)
    return [
        Reading("retrieval", (ids := tokens(70)), [End(len(ids), tokens(n), 3) for n in (7, 9, 6)]),
        Reading("text", text, [End(cut, text[cut : cut + 9], 8) for cut in (30, 80)]),
    ]


def test_ends_say_what_whole_prompts_say(model: SpannedModel) -> None:
    spans = [EVERYTHING, NARROW, HALF, EVERYTHING, NARROW, HALF]
    readings = _readings()
    for reading in readings:
        reading.kept = model.read(reading.ids, spans)
    given = Ends(model, readings).logprobs(spans)
    wanted = [
        model.logprobs(reading.ids[: end.cut] + end.ids, end.compared_tokens, spans)
        for reading in readings
        for end in reading.ends
    ]
    torch.testing.assert_close(given, wanted)


@pytest.mark.parametrize("head", range(6))
def test_layers_below_a_change_need_not_be_run(model: SpannedModel, head: int) -> None:
    spans, readings = [EVERYTHING] * 6, _readings()
    tried = [HALF if other == head else span for other, span in enumerate(spans)]
    for reading in readings:
        reading.kept = model.read(reading.ids, spans)
    ends = Ends(model, readings)
    before = ends.logprobs(spans)
    given = ends.changed(tried, head // 2)
    assert any(not torch.equal(one, two) for one, two in zip(before, given, strict=True))
    torch.testing.assert_close(given, Ends(model, readings).logprobs(tried))
    # And layers are themselves again.
    torch.testing.assert_close(ends.logprobs(spans), before)


def test_what_everything_is_worth_to_a_head(model: SpannedModel) -> None:
    spans, steps = [EVERYTHING, NARROW, HALF, EVERYTHING, NARROW, HALF], []
    readings, asked = _readings(), _readings()[0]
    gaps = divergences(read(model, asked, [EVERYTHING] * 6), read(model, asked, spans))
    needs = needs_of_everything(model, spans, HALF, readings, lambda *step: steps.append(step))
    assert [*needs] == [0, 3]
    assert steps == [(step, 6) for step in range(7)]
    # Of the three questions the two furthest from dense; of a text every end.
    asked.ends.pop(int(gaps.argmin()))
    assert [reading.ends for reading in readings] == [asked.ends, _readings()[1].ends]
    dense = [one for reading in _kept(readings) for one in read(model, reading, [EVERYTHING] * 6)]
    plain = [one for reading in readings for one in read(model, reading, spans)]
    tried = Ends(model, readings).logprobs([*spans[:3], HALF, *spans[4:]])
    before, after = divergences(dense, plain), divergences(dense, tried)
    change = np.log((after + LEAST_DIVERGENCE) / (before + LEAST_DIVERGENCE))
    assert needs[3] == pytest.approx(np.maximum(change, 0).mean(), rel=1e-4)


def _kept(readings: list[Reading]) -> list[Reading]:
    return [Reading(reading.kind, reading.ids, reading.ends) for reading in readings]


def test_half_of_the_full_heads_see_half_and_the_others_more() -> None:
    kept = np.array([[0.1, 0.2, 0.3, 0.5, 1.0]])  # of rules 0 to 4
    rules = [4, 4, 0, 4, 4, 1, 0, 1]
    needs = {0: 0.2, 1: 3.0, 3: 0.1, 4: 1.0}
    program = Program(np.zeros((8, 5)), kept, 0.6, group=2)
    # 1 and 4 keep everything; 1 and 0 go up by one class, 2 being no class of the plan's.
    assert halved(rules, needs, 3, program) == [3, 4, 1, 3, 4, 3, 1, 3]
    narrow = Program(np.zeros((8, 5)), kept, 0.53, group=2)
    assert halved(rules, needs, 3, narrow) == [3, 4, 0, 3, 4, 3, 0, 3]
    tight = Program(np.zeros((8, 5)), kept, 0.48, group=2)
    assert halved(rules, needs, 3, tight) == [3, 4, 1, 3, 4, 1, 1, 1]
    one_group = Program(np.zeros((8, 5)), kept, 0.6, group=4)
    assert halved(rules, needs, 3, one_group) == []


def test_every_needle_is_hidden_and_asked_for() -> None:
    def tokenizer(text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    ids, asked = asked_needles(tokenizer, random.Random(1), 4000, None)
    assert (ids, asked) == asked_needles(tokenizer, random.Random(1), 4000, None)
    text = "".join(map(chr, ids))
    assert len(asked) == 6
    for question_ids, answer in asked:
        question = "".join(map(chr, question_ids))
        subject = question.partition("What is the ")[2].partition("?")[0]
        assert question == f"\nWhat is the {subject}? The {subject} is"
        assert text.count(f"The {subject} is {answer}. Remember it.") == 1
