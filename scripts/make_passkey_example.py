"""Writes docs/examples/passkey-4k.json: a request whose answer stands early in 4,000 tokens.

``.venv/bin/python scripts/make_passkey_example.py`` (needs the demo model's tokenizer).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

MODEL = "models/smollm2-135m-instruct"
FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
)
NEEDLE = "The pass key is 68415. Remember it. 68415 is the pass key. "
QUESTION = "What is the pass key? The pass key is"
PROMPT_TOKENS = 4000
DEPTH = 0.1


def main() -> None:
    """Fills up to the wanted length with the needle at a tenth of it."""
    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL)
    head = "There is an important piece of information hidden in this text. Find it. "

    def prompt(num_fillers: int) -> str:
        before = int(num_fillers * DEPTH)
        return head + FILLER * before + NEEDLE + FILLER * (num_fillers - before) + QUESTION

    num_fillers = 1
    while len(tokenizer(prompt(num_fillers + 1))["input_ids"]) <= PROMPT_TOKENS:
        num_fillers += 1
    request = {
        "model": MODEL,
        "prompt": prompt(num_fillers),
        "max_tokens": 8,
        "temperature": 0,
    }
    target = Path("docs/examples/passkey-4k.json")
    target.write_text(json.dumps(request) + "\n")
    print(f"{target}: {len(tokenizer(request['prompt'])['input_ids'])} tokens")


if __name__ == "__main__":
    main()
