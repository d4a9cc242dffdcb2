"""Which heads need everything and which but half of it: tried out, one by one, around a plan.

Gates (``gates``) tell heads that need much from heads that need little. Whether a head whose gate
is open needs all of the past or half of it, they do not ask; most need half (docs/measurements.md,
"Half of the full heads"). So prompts are read once under the plan, and what follows them is read
again with each head in turn seeing half (``ends``). Fillers are drawn at random, since what heads
need differs more by filler than by needle; and a head counts by what its half costs the answers
that get worse, since few need it, and those that get better by chance would outweigh them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kvcache.spans import Span, everything
from vllm_ext.calibration.data import asked_needles, corpora, require_long_enough
from vllm_ext.calibration.ends import End, Ends, Reading, divergences, read
from vllm_ext.calibration.spanned import SpannedModel

Progress = Callable[[int, int], None]  # what is done, of how many

HARDEST = 2  # questions of a prompt, of those asked: where the plan differs most from dense
TEXT_CUTS = (0.45, 0.7, 0.95)  # of a text: where its ends begin
TEXT_TOKENS = 24  # of such an end
LEAST_DIVERGENCE = 0.01  # added before divergences are compared: what is less does not matter


@dataclass(frozen=True)
class ReadingSizes:
    """How many prompts, and how long.

    Attributes:
        shortest_tokens: of a prompt of needles, questions apart.
        longest_tokens: below which it is; of a text.
        filled: prompts of needles in repeated sentences.
        hidden: prompts of needles in text.
        texts: prompts of text.
    """

    shortest_tokens: int
    longest_tokens: int
    filled: int
    hidden: int
    texts: int


def trial_sizes(longest_tokens: int) -> ReadingSizes:
    """Of the prompts for ``needs_of_everything``."""
    return ReadingSizes(longest_tokens * 3 // 4, longest_tokens, filled=10, hidden=2, texts=2)


def make_readings(
    model: SpannedModel, seed: int, corpus: Path | None, sizes: ReadingSizes
) -> list[Reading]:
    """Prompts with several ends each; the same for the same seed.

    Args:
        model: whose tokenizer it is.
        seed: of the choice.
        corpus: text file; None is Python's library.
        sizes: of the prompts.

    Raises:
        UserError: the corpus is shorter than a prompt.
    """
    source, tokenizer = random.Random(seed), model.tokenizer
    texts = [tokenizer(text)["input_ids"] for text in corpora(corpus)]
    require_long_enough(texts, corpus, sizes.longest_tokens)
    readings = []
    for number in range(sizes.filled + sizes.hidden):
        length = source.randrange(sizes.shortest_tokens, sizes.longest_tokens)
        haystack = None if number < sizes.filled else texts[number % len(texts)]
        ids, asked = asked_needles(tokenizer, source, length, haystack)
        ends = []
        for question, answer in asked:
            answer_ids = tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]
            ends.append(End(len(ids), question + answer_ids, len(answer_ids)))
        readings.append(Reading("retrieval", ids, ends))
    for number in range(sizes.texts):
        text = texts[number % len(texts)]
        start = source.randrange(max(1, len(text) - sizes.longest_tokens))
        ids = text[start : start + sizes.longest_tokens]
        cuts = [int(share * len(ids)) for share in TEXT_CUTS]
        ends = [End(cut, ids[cut : cut + TEXT_TOKENS + 1], TEXT_TOKENS) for cut in cuts]
        readings.append(Reading("text", ids, ends))
    return readings


def needs_of_everything(
    model: SpannedModel,
    spans: Sequence[Span],
    half: Span,
    readings: Sequence[Reading],
    progress: Progress,
) -> dict[int, float]:
    """What it costs every head that sees everything to see half.

    Args:
        model: frozen.
        spans: of each KV head, layer by layer: the plan.
        half: what they would see.
        readings: of ``make_readings``; their ends become fewer.
        progress: told of every reading and every trial.

    Returns:
        By head: by how much the logarithms of the divergences from dense rise, falls not counted,
        on average over the ends.
    """
    heads = [head for head, span in enumerate(spans) if span.hides_nothing]
    steps = 2 * len(readings) + len(heads)
    wanted: list[torch.Tensor] = []
    for number, reading in enumerate(readings):
        progress(2 * number, steps)
        dense = read(model, reading, [everything()] * len(spans))
        progress(2 * number + 1, steps)
        given = read(model, reading, spans)
        if reading.kind == "retrieval":
            hardest = np.argsort(divergences(dense, given))[-HARDEST:]
            reading.ends = [reading.ends[end] for end in sorted(hardest)]
            dense = [dense[end] for end in sorted(hardest)]
        wanted += dense
    ends = Ends(model, readings)
    before = divergences(wanted, ends.logprobs(spans)) + LEAST_DIVERGENCE
    needs = {}
    for number, head in enumerate(heads):
        progress(2 * len(readings) + number, steps)
        tried = [half if other == head else span for other, span in enumerate(spans)]
        given = ends.changed(tried, head // model.num_kv_heads)
        after = divergences(wanted, given) + LEAST_DIVERGENCE
        needs[head] = float(np.maximum(np.log(after / before), 0).mean())
    progress(steps, steps)
    return needs
