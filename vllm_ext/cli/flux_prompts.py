"""Prompts that judge what FLUX's calibration found: here, since calibration and evaluation do not
import one another.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_ext.calibration.routed_prompts import RoutedPrompt, make_prompts
from vllm_ext.evaluation.prompts import needle_prompts, text_prompts

NEEDLE_KINDS = ("passkey", "multi_key")


def held_out(
    tokenizer: Any,
    number: int,
    lengths_tokens: Sequence[int],
    corpus: Path | None = None,
    seed: int = 0,
) -> list[RoutedPrompt]:
    """As many of each kind; other texts than those of the fit, half of the needles other too.

    Args:
        tokenizer: of the model.
        number: of each kind.
        lengths_tokens: of the prompts, about; ascending.
        corpus: text file, whose stretches may be those of the fit; None is modules of Python's
            library that nothing is fitted on.
        seed: of the choice.

    Raises:
        UserError: the corpus is shorter than a prompt.
    """
    source = random.Random(1_000_003 + seed)
    texts = text_prompts(tokenizer, 7 + seed, 12, lengths_tokens[-1] + 512, corpus)
    prompts = make_prompts(tokenizer, source, texts, lengths_tokens, number)
    half = number // 2
    others = [
        one
        for length in lengths_tokens
        for one in needle_prompts(
            tokenizer,
            length,
            {kind: [1] for kind in NEEDLE_KINDS},
            [length],
            [source.random() for _ in range(half)],
        )
    ]
    source.shuffle(others)
    others.sort(key=lambda one: one.length_tokens)
    spread = others[:: max(1, len(others) // half)][:half] if half else []
    # Those in a text: the fit knows the fillers.
    hidden = [one for place, one in enumerate(prompts[::3]) if place % 3 != 1 or number < 6]
    retrieval = hidden[: number - len(spread)]
    return [
        *retrieval,
        *(RoutedPrompt("retrieval", o.length_tokens, o.ids, o.answers) for o in spread),
        *(one for one in prompts if one.kind != "retrieval"),
    ]
