"""The demo model and its tokenizer, shared by the end-to-end tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.engine import end_engines

ROOT = Path(__file__).resolve().parents[2]
MODEL = Path(os.environ.get("VLLM_EXT_TEST_MODEL", ROOT / "models" / "smollm2-135m-instruct"))


@pytest.fixture(scope="session", autouse=True)
def _no_engine_is_left() -> Iterator[None]:
    yield
    end_engines()


@pytest.fixture(scope="session")
def model_path() -> str:
    """Folder of the demo model."""
    if not (MODEL / "config.json").is_file():
        pytest.fail(f"{MODEL} is missing; run `make setup` (or vllm-ext demo-model)")
    return str(MODEL)


@pytest.fixture(scope="session")
def prompts(model_path: str) -> list[list[int]]:
    """See ``tests.e2e.prompts``."""
    from transformers import AutoTokenizer

    from tests.e2e.prompts import make_prompts

    tokenizer: Any = AutoTokenizer.from_pretrained(model_path)
    return make_prompts(tokenizer)
