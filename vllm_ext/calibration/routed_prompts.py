"""Prompts of FLUX's calibration: needles, text to go on with, and instructions about a text."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_ext.calibration.data import needles_question

KINDS = ("retrieval", "text", "instruction")
_TEMPLATE_TOKENS = 96  # the chat template's, and the instruction's
_INSTRUCTIONS = (
    "Summarize the following text in two sentences.\n\n{text}",
    "{text}\n\nRewrite the first paragraph of the text above in simpler words.",
    "Read the text. A question follows it.\n\n{text}\n\nQuestion: What is the text about?",
    "{text}\n\nList the names of the first three things that the text above explains.",
    "Which terms does the following text define? Answer with a list.\n\n{text}",
    "{text}\n\nHow does the text above begin, and how does it end?",
)


@dataclass(frozen=True)
class RoutedPrompt:
    """What the model is asked.

    Attributes:
        kind: of ``KINDS``.
        length_tokens: nominal length.
        ids: the prompt.
        answers: of a needle's question; empty for other kinds.
    """

    kind: str
    length_tokens: int
    ids: list[int]
    answers: tuple[str, ...] = ()


def make_prompts(
    tokenizer: Any,
    source: random.Random,
    texts: Sequence[list[int]],
    lengths_tokens: Sequence[int],
    number: int,
) -> list[RoutedPrompt]:
    """As many of each kind, lengths and texts by turns.

    Args:
        tokenizer: of the model.
        source: of randomness.
        texts: tokens to cut prompts from, each longer than a prompt.
        lengths_tokens: of the prompts, about.
        number: of each kind.
    """
    prompts = []
    for index in range(number):
        length_tokens = lengths_tokens[index % len(lengths_tokens)]
        text = texts[index // len(lengths_tokens) % len(texts)]
        haystack = None if index % 3 == 1 else text
        ids, answer = needles_question(tokenizer, source, length_tokens, haystack)
        prompts.append(RoutedPrompt("retrieval", length_tokens, ids, (answer,)))
        ids = _stretch(source, text, length_tokens)
        prompts.append(RoutedPrompt("text", length_tokens, ids))
        excerpt = tokenizer.decode(_stretch(source, text, length_tokens - _TEMPLATE_TOKENS))
        content = source.choice(_INSTRUCTIONS).format(text=excerpt)
        prompts.append(RoutedPrompt("instruction", length_tokens, _asked(tokenizer, content)))
    return prompts


def _asked(tokenizer: Any, content: str) -> list[int]:
    """As a user's message, or plainly where the model knows no chat."""
    if getattr(tokenizer, "chat_template", None) is None:
        ids: list[int] = tokenizer(content)["input_ids"]
        return ids
    messages = [{"role": "user", "content": content}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    return ids


def _stretch(source: random.Random, text: list[int], num_tokens: int) -> list[int]:
    start = source.randrange(len(text) - num_tokens + 1)
    return text[start : start + num_tokens]
