"""What benchmarks and load tests compare unless told otherwise, by what the methods are for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attn_backends.method import Purpose
from attn_backends.methods import compared_methods
from vllm_ext.bench.decode import INSTALLED, STOCK
from vllm_ext.methods import REGISTRY, frees_memory


def serving_arms() -> list[str]:
    """Stock vLLM and the methods that users choose between."""
    return [STOCK, *compared_methods(Purpose.SERVING)]


def timed_arms() -> list[str]:
    """Stock vLLM and every method but upper bounds: those are for quality, not for speed."""
    return [STOCK, *compared_methods(Purpose.SERVING, Purpose.CHECK)]


def overhead_arms() -> list[str]:
    """Stock vLLM, the extension without a method, and the methods that answer as stock does."""
    return [STOCK, INSTALLED, *compared_methods(Purpose.CHECK)]


def freeing_arms(model: Path, settings: Mapping[str, Any]) -> list[str]:
    """Stock vLLM and the methods that free memory of this checkpoint: those that need a profile
    where one is shipped for it or among the settings.
    """
    return [STOCK, *(name for name in REGISTRY if frees_memory(name, settings, model))]
