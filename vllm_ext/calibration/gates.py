"""Which KV heads need everything: gates between all of the past and a narrow span, learned.

Influence is of the first order around the dense model. Where heads stand in for one another,
hiding the past from any of them changes little and hiding it from all changes much; gates are
learned together, and see it. DuoAttention (arXiv 2410.10819, section 2.2) learns them so, on pass
keys and frozen weights. We differ: what is kept small is the divergence from the dense model's
next token at the answers, not the distance of hidden states; text counts, too; gates begin where
influence ranks the heads, so that dozens of short prompts do instead of thousands of steps; and
the price of an open gate follows the share of them that the budget pays for.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from kvcache.spans import Span
from vllm_ext.calibration.assignment import density_of
from vllm_ext.calibration.data import corpora, needles_question
from vllm_ext.calibration.spanned import SpannedModel, attend_span

PROMPT_SHARES = (8, 4)  # of the longest calibrated prompt
STEPS = 48
RATE = 0.3  # of Adam; less in the last part
LAST_PART, LAST_RATE = 0.4, 0.3  # of the steps, of the rate
RAMP = 0.5  # of the steps, while the share falls to what the budget pays for
PRICE_STEP, MOST_PRICE = 0.75, 7.5  # of an open gate, per step and share too much
TEXT_WEIGHT = 5.0  # divergences on text are smaller than those of answers
MOST_DIVERGENCE = 5.0  # of a sample: a lost answer is not to outweigh the others
PROMPTS_PER_LENGTH = 30
TEXT_EVERY = 5  # prompts
TEXT_TOKENS = 32  # compared at the end of a text
TRIES = 8  # for a question that the dense model answers

if TYPE_CHECKING:
    from vllm_ext.calibration.elastic import ElasticSettings

Progress = Callable[[int, int], None]  # steps that are done, of how many


@dataclass(frozen=True)
class Sample:
    """A prompt and what the dense model makes of its end.

    Attributes:
        kind: ``retrieval`` or ``text``.
        ids: with the answer.
        compared_tokens: at the end.
        dense: ``[compared_tokens, vocabulary]`` log-probabilities.
    """

    kind: str
    ids: list[int]
    compared_tokens: int
    dense: torch.Tensor


def learned_gates(
    model: SpannedModel,
    span: Span,
    costs: np.ndarray,
    settings: ElasticSettings,
    progress: Progress,
) -> list[float]:
    """How far each head's gate is open, 0 to 1, layer by layer.

    Args:
        model: frozen.
        span: what a head sees whose gate is shut.
        costs: ``[heads]``, the influence of that.
        settings: of the calibration.
        progress: told of every step.
    """
    longest = settings.context_tokens
    samples = make_samples(
        model, settings.seed, settings.corpus, [longest // share for share in PROMPT_SHARES]
    )
    kept = density_of(span, longest)
    open_share = min(max((settings.density - kept) / (1 - kept), 0.0), 1.0)
    start = starting_gates(costs, model.num_layers).to(model.model.device)
    return learn(model, Gates(span, start), samples, open_share, settings.seed, progress)


def make_samples(
    model: SpannedModel, seed: int, corpus: Path | None, lengths_tokens: Sequence[int]
) -> list[Sample]:
    """Questions that the dense model answers rightly, and texts; the same for the same seed.

    Args:
        model: to be gated.
        seed: of the choice.
        corpus: text file; None is Python's library.
        lengths_tokens: of the prompts, as many of each.
    """
    source, tokenizer = random.Random(seed), model.tokenizer
    texts = [tokenizer(text)["input_ids"] for text in corpora(corpus)]
    samples = []
    for number in range(PROMPTS_PER_LENGTH * len(lengths_tokens)):
        length = lengths_tokens[number % len(lengths_tokens)]
        if number // len(lengths_tokens) % TEXT_EVERY == TEXT_EVERY - 1:
            text = source.choice(texts)
            start = source.randrange(max(1, len(text) - length))
            samples.append(_compared(model, "text", text[start : start + length], TEXT_TOKENS))
        elif (sample := _answered(model, source, texts, length)) is not None:
            samples.append(sample)
    return samples


def _answered(
    model: SpannedModel, source: random.Random, texts: list[list[int]], length_tokens: int
) -> Sample | None:
    for _ in range(TRIES):
        haystack = source.choice((None, None, *texts))
        ids, answer = needles_question(model.tokenizer, source, length_tokens, haystack)
        answer_ids = model.tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]
        sample = _compared(model, "retrieval", ids + answer_ids, len(answer_ids))
        if sample.dense.argmax(-1).tolist() == answer_ids:
            return sample
    return None


def _compared(model: SpannedModel, kind: str, ids: list[int], num_tokens: int) -> Sample:
    with torch.no_grad():
        return Sample(kind, ids, num_tokens, model.last_logprobs(ids, num_tokens))


class Gates:
    """An attention function for transformers that mixes everything and a span.

    Args:
        span: what a head sees whose gate is shut.
        start: ``[num_layers, num_kv_heads]``, logits of the gates.

    Attributes:
        logits: likewise, learned.
    """

    def __init__(self, span: Span, start: torch.Tensor) -> None:
        self._span = span
        self.logits = start.clone().requires_grad_()

    def attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """transformers' attention signature, of whole prompts."""
        whole = scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        narrow = attend_span(query, key, value, self._span, scaling)
        open_ = torch.sigmoid(self.logits[module.layer_idx])
        open_ = open_.repeat_interleave(query.shape[1] // key.shape[1])[:, None, None]
        out = open_ * whole + (1 - open_) * narrow
        return out.transpose(1, 2).contiguous(), None


def starting_gates(costs: np.ndarray, num_layers: int) -> torch.Tensor:
    """``[num_layers, num_kv_heads]`` logits: mostly open, in the order of influence.

    Args:
        costs: ``[heads]``, not below 0: of the narrow span.
        num_layers: of the model.
    """
    ranks = np.log(np.maximum(costs, 1e-9))
    ranks = (ranks - ranks.mean()) / max(float(ranks.std()), 1e-9)
    return torch.tensor(1.5 + ranks.clip(-2, 2), dtype=torch.float32).reshape(num_layers, -1)


def learn(
    model: SpannedModel,
    gates: Gates,
    samples: Sequence[Sample],
    open_share: float,
    seed: int,
    progress: Progress,
) -> list[float]:
    """Learns the gates.

    Args:
        model: frozen.
        gates: on the model's device.
        samples: of the prompts.
        open_share: of the gates, at the end.
        seed: of the samples' order.
        progress: told of every step.

    Returns:
        How far each head's gate is open, 0 to 1, layer by layer.
    """
    optimizer = torch.optim.Adam([gates.logits], lr=RATE)
    source, price = random.Random(seed), 0.0
    left: list[Sample] = []
    with model.attending(gates.attend):
        for step in range(STEPS):
            progress(step, STEPS)
            left = left or source.sample(samples, len(samples))
            share = torch.sigmoid(gates.logits).mean()
            aimed = 1 - min(1.0, (step + 1) / (RAMP * STEPS)) * (1 - open_share)
            price += PRICE_STEP * (float(share.detach()) - aimed)
            price = min(max(price, 0.0), MOST_PRICE)
            optimizer.zero_grad()
            (_loss(model, left.pop()) + price * share).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if step >= (1 - LAST_PART) * STEPS:
                optimizer.param_groups[0]["lr"] = RATE * LAST_RATE
    progress(STEPS, STEPS)
    found: list[float] = torch.sigmoid(gates.logits).detach().flatten().tolist()
    return found


def _loss(model: SpannedModel, sample: Sample) -> torch.Tensor:
    given = model.last_logprobs(sample.ids, sample.compared_tokens)
    divergence = (sample.dense.exp() * (sample.dense - given)).sum(-1).mean()
    weight = TEXT_WEIGHT if sample.kind == "text" else 1.0
    return weight * divergence.clamp_max(MOST_DIVERGENCE)
