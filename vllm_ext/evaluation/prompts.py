"""Needle prompts over lengths and depths, and natural text to continue.

Not calibration's prompts: other needles, other fillers, other files. Every needle has its
question at the end, after the context (nothing is selected with the question known
beforehand: ``query_aware`` is false).
"""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_ext.errors import UserError

_FILLER = (
    "The train left the station on time. Nobody was late. The conductor checked the tickets, "
    "the windows were clean, and the fields went by. "
)
_PLACES = ("Lisbon", "Oslo", "Quito", "Hanoi", "Perth", "Turin", "Dakar", "Salem")
_TEXT_FILES = ("difflib", "tarfile", "_pydecimal", "ipaddress", "statistics", "logging/__init__")


@dataclass(frozen=True)
class NeedlePrompt:
    """One question about a long context.

    Attributes:
        kind: ``passkey``, ``multi_key`` (one of several keys is asked for) or ``multi_value``
            (one key has several values).
        length_tokens: nominal length.
        depth: where the first needle is, 0 (start) to 1.
        ids: the prompt.
        answers: all of them must come, in any order.
    """

    kind: str
    length_tokens: int
    depth: float
    ids: list[int]
    answers: tuple[str, ...]

    def score(self, text: str) -> float:
        """Share of the answers that the text has."""
        return sum(answer in text for answer in self.answers) / len(self.answers)


def _code(source: random.Random) -> str:
    return str(source.randrange(10_000, 99_999))


def _passkey(source: random.Random) -> tuple[list[str], str, tuple[str, ...]]:
    code = _code(source)
    needle = f"The pass key is {code}. Remember it. {code} is the pass key. "
    return [needle], "What is the pass key? The pass key is", (code,)


def _multi_key(source: random.Random) -> tuple[list[str], str, tuple[str, ...]]:
    places = source.sample(_PLACES, 4)
    codes = [_code(source) for _ in places]
    needles = [
        f"The pass key of {place} is {code}. Remember it. {code} is the pass key of {place}. "
        for place, code in zip(places, codes, strict=True)
    ]
    question = f"What is the pass key of {places[0]}? The pass key of {places[0]} is"
    return needles, question, (codes[0],)


def _multi_value(source: random.Random) -> tuple[list[str], str, tuple[str, ...]]:
    codes = tuple(_code(source) for _ in range(2))
    ordinals = ("first", "second")
    needles = [
        f"The {ordinal} pass key is {code}. Remember it. "
        for ordinal, code in zip(ordinals, codes, strict=True)
    ]
    question = (
        "What are the two pass keys? The first pass key and the second pass key, in that order: "
        "The first pass key is"
    )
    return needles, question, codes


KINDS: dict[str, Callable[[random.Random], tuple[list[str], str, tuple[str, ...]]]] = {
    "passkey": _passkey,
    "multi_key": _multi_key,
    "multi_value": _multi_value,
}


def needle_prompt(
    tokenizer: Any, source: random.Random, kind: str, length_tokens: int, depth: float
) -> NeedlePrompt:
    """A prompt of at most ``length_tokens``; needles after the first lie at random depths."""
    needles, question, answers = KINDS[kind](source)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    tail = encode(question)
    room = length_tokens - len(tail) - sum(len(encode(needle)) for needle in needles)
    filler = encode(_FILLER)
    sentences = [filler] * (room // len(filler))
    depths = [depth, *(source.random() for _ in needles[1:])]
    # From the end, so that earlier places stay where they are.
    for where, needle in sorted(zip(depths, needles, strict=True), reverse=True):
        sentences.insert(round(where * len(sentences)), encode(needle))
    ids = [token for sentence in sentences for token in sentence] + tail
    return NeedlePrompt(kind, length_tokens, depth, ids, answers)


def needle_prompts(
    tokenizer: Any,
    seed: int,
    counts: Mapping[str, Sequence[int]],
    lengths_tokens: list[int],
    depths: list[float],
) -> list[NeedlePrompt]:
    """``counts[kind][i]`` prompts of every kind and depth, of the ``i``-th length."""
    source = random.Random(seed)
    return [
        needle_prompt(tokenizer, source, kind, length, depth)
        for place, length in enumerate(lengths_tokens)
        for kind, of_length in counts.items()
        for depth in depths
        for _ in range(of_length[place])
    ]


def text_prompts(
    tokenizer: Any, seed: int, num_prompts: int, length_tokens: int, corpus: Path | None
) -> list[list[int]]:
    """Stretches of natural text: a file of the user's, or modules of the standard library that
    calibration does not use.

    Raises:
        UserError: a file is shorter than a prompt.
    """
    source = random.Random(seed)
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [corpus] if corpus is not None else [library / f"{name}.py" for name in _TEXT_FILES]
    prompts = []
    for number in range(num_prompts):
        file = files[number % len(files)]
        text = file.read_text(encoding="utf-8", errors="replace")
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) < length_tokens:
            raise UserError(
                f"{file} has {len(ids)} tokens, less than the {length_tokens} of a text prompt; "
                "give a longer --corpus or fewer --text-tokens (--long-texts 0)"
            )
        start = source.randrange(len(ids) - length_tokens + 1)
        prompts.append(ids[start : start + length_tokens])
    return prompts
