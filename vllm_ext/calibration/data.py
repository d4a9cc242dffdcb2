"""Calibration prompts: natural text from the standard library, and synthetic retrieval."""

from __future__ import annotations

import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORCED_TOKENS = 10  # decode steps that are compared per prompt
_SUBJECTS = ("pass key", "access code", "locker number", "ticket number", "vault code")
_FILLERS = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. ",
    "Rain fell on the harbour all morning. The boats stayed in. People read the papers twice. ",
)


@dataclass(frozen=True)
class Example:
    """Token ids; the last ``FORCED_TOKENS`` are decoded step by step."""

    kind: str  # "retrieval" or "text"
    ids: list[int]


def corpus(path: Path | None) -> str:
    """Natural English and code: a file of the user's, or the standard library's modules."""
    if path is not None:
        return path.read_text(encoding="utf-8", errors="replace")
    library = Path(sysconfig.get_paths()["stdlib"])
    names = ("argparse", "asyncio/tasks", "doctest", "email/message", "pickletools", "typing")
    return "\n".join((library / f"{name}.py").read_text() for name in names)


def retrieval_example(tokenizer: Any, source: random.Random, num_tokens: int) -> Example:
    """A needle at a random depth, asked for at the end, its answer following."""
    subject, filler = source.choice(_SUBJECTS), source.choice(_FILLERS)
    code = str(source.randrange(10_000, 99_999))
    needle = f"The {subject} is {code}. Remember it. {code} is the {subject}. "
    question = f"What is the {subject}? The {subject} is {code}. Remember it."
    per_filler = len(tokenizer(filler)["input_ids"])
    num_fillers = max(2, (num_tokens - 80) // per_filler)
    before = int(num_fillers * source.uniform(0.02, 0.9))
    text = filler * before + needle + filler * (num_fillers - before) + question
    return Example("retrieval", tokenizer(text)["input_ids"])


def text_example(ids: list[int], source: random.Random, num_tokens: int) -> Example:
    """A stretch of the corpus."""
    start = source.randrange(max(1, len(ids) - num_tokens))
    return Example("text", ids[start : start + num_tokens])


def make_examples(
    tokenizer: Any, seed: int, corpus_path: Path | None, num_tokens: int, num_each: int
) -> list[Example]:
    """Equal numbers of retrieval and text examples, the same for the same seed."""
    source = random.Random(seed)
    ids = tokenizer(corpus(corpus_path))["input_ids"]
    retrieval = [
        retrieval_example(tokenizer, source, source.randrange(num_tokens // 2, num_tokens))
        for _ in range(num_each)
    ]
    return retrieval + [text_example(ids, source, num_tokens) for _ in range(num_each)]
