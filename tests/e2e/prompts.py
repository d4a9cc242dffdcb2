"""Prompts of 5 to 3,000 tokens from the standard library's own sources."""

from __future__ import annotations

import argparse
import ast
import inspect
import textwrap
from pathlib import Path
from typing import Any

LENGTHS = (5, 17, 31, 32, 33, 63, 64, 65, 127, 200, 350, 511, 800, 1300, 2100, 3000)


def corpus() -> str:
    """Natural English and code, the same on every machine with this Python version."""
    modules = (argparse, ast, inspect, textwrap)
    return "\n".join(Path(inspect.getfile(module)).read_text() for module in modules)


def make_prompts(tokenizer: Any) -> list[list[int]]:
    """Token ids of the prompts, one per length, from different places of the corpus."""
    ids = tokenizer(corpus())["input_ids"]
    return [ids[start * 577 : start * 577 + n] for start, n in enumerate(LENGTHS)]
