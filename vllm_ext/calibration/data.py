"""Calibration prompts: natural text from the standard library, and synthetic retrieval."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_ext.errors import UserError

TEXT_FORCED_TOKENS = 64  # decode steps compared per text example
_QUESTION_FORCED_TOKENS = 4  # before a retrieval answer: the question must not drift either
_SUBJECTS = (
    "pass key",
    "access code",
    "locker number",
    "ticket number",
    "vault code",
    "serial number of the red pump",
    "phone extension of the night desk",
)
_THINGS = ("pass key", "entry code", "room number", "password")
_OWNERS = ("Anna", "Boris", "Chen", "Dolores", "the north gate", "the old mill", "Kyoto", "Denver")
_WORDS = ("harbour", "violet", "copper", "lantern", "meadow", "falcon", "granite", "walnut")
_FILLERS = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. ",
    "Rain fell on the harbour all morning. The boats stayed in. People read the papers twice. ",
)
_SENTENCES = (  # a few of them, repeated, are another filler
    "The kettle was on.",
    "Nobody spoke.",
    "A cat slept on the mat.",
    "Two boys carried a ladder.",
    "The shop closed at six.",
    "She read the letter again, folded it, and went upstairs.",
    "He paid and left.",
    "There were apples in the bowl.",
    "Snow lay on the roofs.",
    "The clerk stamped the forms, the phone rang, and the line moved on.",
    "Someone was singing.",
    "The door stood open.",
    "They talked about the weather.",
    "The clock struck nine.",
    "A van stopped at the corner, and a man got out.",
    "Dogs barked far away.",
    "The teacher wiped the board.",
    "The soup was hot, the plates were blue, and everyone sat down.",
    "The gate was painted green.",
    "We waited for the ferry.",
)
_NEEDLE_TOKENS = 40  # of each, about
_CODE = ("argparse", "asyncio/tasks", "doctest", "email/message", "pickletools", "typing")
_PROSE = ("pydoc_data/topics",)


@dataclass(frozen=True)
class Example:
    """Token ids; the last ``forced_tokens`` are decoded step by step."""

    kind: str  # "retrieval" or "text"
    ids: list[int]
    forced_tokens: int


@dataclass(frozen=True)
class Sizes:
    """How many prompts, and how long."""

    context_tokens: int  # the longest
    examples: int  # of each kind


def corpora(path: Path | None) -> list[str]:
    """Texts to cut examples from: a file of the user's, or the standard library's code and its
    language reference (code and prose count the same).
    """
    if path is not None:
        return [path.read_text(encoding="utf-8", errors="replace")]
    library = Path(sysconfig.get_paths()["stdlib"])
    return [
        "\n".join((library / f"{name}.py").read_text(encoding="utf-8") for name in names)
        for names in (_CODE, _PROSE)
    ]


def require_long_enough(
    texts: Sequence[Sequence[int]], corpus: Path | None, longest_tokens: int
) -> None:
    """Examples are cut from texts.

    Raises:
        UserError: a text is shorter than the longest example.
    """
    shortest = min(len(ids) for ids in texts)
    if shortest < longest_tokens:
        named = "the default corpus (Python's library)" if corpus is None else f"--corpus {corpus}"
        raise UserError(
            f"{named} has {shortest} tokens, less than the {longest_tokens} of the longest "
            "example; give a longer --corpus, or fewer --context-tokens"
        )


def retrieval_example(
    tokenizer: Any, source: random.Random, num_tokens: int, haystack: list[int] | None
) -> Example:
    """A needle at a random depth, asked for at the end, its answer following.

    Args:
        tokenizer: of the model.
        source: of randomness.
        num_tokens: about how long.
        haystack: tokens to hide it in, or None for repeated filler sentences.
    """
    subject = source.choice(_SUBJECTS)
    answer = source.choice((str(source.randrange(10_000, 99_999)), source.choice(_WORDS)))
    needle = f"\nThe {subject} is {answer}. Remember it. {answer} is the {subject}.\n"
    question = tokenizer(f"\nWhat is the {subject}? The {subject} is")["input_ids"]
    answer_ids = tokenizer(f" {answer}.")["input_ids"]
    if haystack is None:
        filler = tokenizer(source.choice(_FILLERS))["input_ids"]
        haystack = filler * (num_tokens // len(filler) + 1)
    start = source.randrange(max(1, len(haystack) - num_tokens))
    hay = haystack[start : start + max(1, num_tokens - 60)]
    before = int(len(hay) * source.uniform(0.02, 0.95))
    ids = hay[:before] + tokenizer(needle)["input_ids"] + hay[before:] + question + answer_ids
    return Example("retrieval", ids, len(answer_ids) + _QUESTION_FORCED_TOKENS)


def needles_example(
    tokenizer: Any, source: random.Random, num_tokens: int, haystack: list[int] | None
) -> list[int]:
    """The prompt of ``needles_question``."""
    return needles_question(tokenizer, source, num_tokens, haystack)[0]


def needles_question(
    tokenizer: Any, source: random.Random, num_tokens: int, haystack: list[int] | None
) -> tuple[list[int], str]:
    """A prompt with one to four needles at random depths, one of which is asked for at the end.

    By chance, their subjects differ altogether or by whose they are alone: the latter is more than
    finding the place where a question's words stand.

    Args:
        tokenizer: of the model.
        source: of randomness.
        num_tokens: about how long.
        haystack: tokens to hide them in, or None for repeated filler sentences.

    Returns:
        The prompt, and the answer to its question.
    """
    subjects = source.sample(_subjects(source), source.randrange(1, 5))
    if haystack is None:
        filler = tokenizer(source.choice(_FILLERS))["input_ids"]
        haystack = filler * (num_tokens // len(filler) + 1)
    start = source.randrange(max(1, len(haystack) - num_tokens))
    ids = haystack[start : start + max(1, num_tokens - _NEEDLE_TOKENS * len(subjects))]
    ids, answers = _hidden(tokenizer, source, ids, subjects)
    return ids + _question(tokenizer, subjects[0]), answers[0]


def asked_needles(
    tokenizer: Any, source: random.Random, num_tokens: int, haystack: list[int] | None
) -> tuple[list[int], list[tuple[list[int], str]]]:
    """Half a dozen needles at random depths, to be asked for one by one.

    Args:
        tokenizer: of the model.
        source: of randomness.
        num_tokens: about how long, questions apart.
        haystack: tokens to hide them in, or None for a few sentences drawn at random and repeated.

    Returns:
        Tokens without a question, and every needle's question and answer.
    """
    subjects = source.sample(_subjects(source), 6)
    if haystack is None:
        drawn = source.sample(_SENTENCES, source.randrange(2, 5))
        filler = tokenizer(" ".join(drawn) + " ")["input_ids"]
        haystack = filler * (num_tokens // len(filler) + 1)
    start = source.randrange(max(1, len(haystack) - num_tokens))
    ids = haystack[start : start + max(1, num_tokens - _NEEDLE_TOKENS * len(subjects))]
    ids, answers = _hidden(tokenizer, source, ids, subjects, source.choice(("\n", "")))
    questions = [_question(tokenizer, subject) for subject in subjects]
    return ids, list(zip(questions, answers, strict=True))


def _hidden(
    tokenizer: Any,
    source: random.Random,
    ids: list[int],
    subjects: Sequence[str],
    around: str = "\n",
) -> tuple[list[int], list[str]]:
    """The tokens with a needle for every subject, and the answers."""
    answers = []
    for subject in subjects:
        answer = source.choice((str(source.randrange(10_000, 99_999)), source.choice(_WORDS)))
        answers.append(answer)
        needle = f"The {subject} is {answer}. Remember it. {answer} is the {subject}."
        needle_ids = tokenizer(f"{around}{needle}{around or ' '}")["input_ids"]
        place = int(len(ids) * source.uniform(0.02, 0.95))
        ids = ids[:place] + needle_ids + ids[place:]
    return ids, answers


def _question(tokenizer: Any, subject: str) -> list[int]:
    ids: list[int] = tokenizer(f"\nWhat is the {subject}? The {subject} is")["input_ids"]
    return ids


def _subjects(source: random.Random) -> list[str]:
    if source.random() < 0.5:
        return list(_SUBJECTS)
    thing = source.choice(_THINGS)
    return [f"{thing} of {owner}" for owner in _OWNERS]


def text_example(ids: list[int], source: random.Random, num_tokens: int) -> Example:
    """A stretch of a corpus."""
    start = source.randrange(max(1, len(ids) - num_tokens))
    return Example("text", ids[start : start + num_tokens], TEXT_FORCED_TOKENS)


def make_examples(
    tokenizer: Any, seed: int, corpus_path: Path | None, sizes: Sizes
) -> list[Example]:
    """Retrieval and text examples by turns, of half to full length; the same for the same seed.

    Raises:
        UserError: the corpus is shorter than an example.
    """
    source = random.Random(seed)
    texts = [tokenizer(text)["input_ids"] for text in corpora(corpus_path)]
    require_long_enough(texts, corpus_path, sizes.context_tokens)
    examples = []
    for number in range(sizes.examples):
        lengths = [
            source.randrange(sizes.context_tokens // 2, sizes.context_tokens) for _ in range(2)
        ]
        haystack = texts[number // 2 % len(texts)] if number % 2 else None
        examples.append(retrieval_example(tokenizer, source, lengths[0], haystack))
        examples.append(text_example(texts[number % len(texts)], source, lengths[1]))
    return examples
