"""What benchmarks and load tests compare unless told otherwise, by what the methods are for."""

from __future__ import annotations

from attn_backends.method import Purpose
from attn_backends.methods import compared_methods
from vllm_ext.bench.decode import INSTALLED, STOCK


def serving_arms() -> list[str]:
    """Stock vLLM and the methods that users choose between."""
    return [STOCK, *compared_methods(Purpose.SERVING)]


def timed_arms() -> list[str]:
    """Stock vLLM and every method but upper bounds: those are for quality, not for speed."""
    return [STOCK, *compared_methods(Purpose.SERVING, Purpose.CHECK)]


def overhead_arms() -> list[str]:
    """Stock vLLM, the extension without a method, and the methods that answer as stock does."""
    return [STOCK, INSTALLED, *compared_methods(Purpose.CHECK)]
