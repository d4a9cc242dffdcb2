"""Prompts of MOA's calibration; the dense model answers them itself."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_ext.calibration.data import corpora, needles_example, require_long_enough

RESPONSE_TOKENS = {"retrieval": 12, "text": 48}


@dataclass(frozen=True)
class Prompt:
    """What the model is asked.

    Attributes:
        kind: of ``RESPONSE_TOKENS``.
        length_tokens: with the response, about.
        ids: the prompt alone.
    """

    kind: str
    length_tokens: int
    ids: list[int]


def make_prompts(
    tokenizer: Any, seed: int, corpus: Path | None, lengths_tokens: Sequence[int], number: int
) -> list[Prompt]:
    """As many of each kind at each length; the same for the same seed.

    Args:
        tokenizer: of the model.
        seed: of the choice.
        corpus: text file; None is Python's library.
        lengths_tokens: with the responses.
        number: of each kind and length.

    Raises:
        UserError: the corpus is shorter than a prompt.
    """
    source = random.Random(seed)
    texts = [tokenizer(text)["input_ids"] for text in corpora(corpus)]
    require_long_enough(texts, corpus, max(lengths_tokens))
    prompts = []
    for length_tokens in lengths_tokens:
        for index in range(number):
            text = texts[index % len(texts)]
            haystack = text if index % 2 else None
            room = length_tokens - RESPONSE_TOKENS["retrieval"]
            ids = needles_example(tokenizer, source, room, haystack)
            prompts.append(Prompt("retrieval", length_tokens, ids))
            start = source.randrange(max(1, len(text) - length_tokens))
            ids = text[start : start + length_tokens - RESPONSE_TOKENS["text"]]
            prompts.append(Prompt("text", length_tokens, ids))
    return prompts
