"""MoA's published files: ``{"alphas": [[...]], "betas": [[...]]}`` by layer and query head.

Source: thu-nics/MoA (arXiv 2406.14909): a query head keeps ``alpha + beta * N`` tokens, at least
128, of which the first 64 are sinks. Its N is the final length of the prompt plus 1,024; ours is
the query's own position plus one (``kvcache.spans``), which is never more.
"""

from __future__ import annotations

import math
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from attn_backends.config import ConfigError, read_text
from kvcache.spans import BETA_UNIT, Span, covering

MAX_RULES_BYTES = 4 << 20
SINK_TOKENS = 64
LEAST_TOKENS = 128  # sinks included
MAX_TOKENS = 1 << 20


class PublishedRules(BaseModel):
    """The file's content.

    Attributes:
        alphas: tokens, by layer and query head; may be negative.
        betas: shares of the length, by layer and query head, 0 to 1.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    alphas: list[list[float]] = Field(min_length=1, max_length=1024)
    betas: list[list[float]] = Field(min_length=1, max_length=1024)

    def require_shape(self, num_layers: int, num_query_heads: int) -> None:
        """Refuses rules of another model.

        Raises:
            ConfigError: names both shapes.
        """
        for name, rows in (("alphas", self.alphas), ("betas", self.betas)):
            shape = (len(rows), sorted({len(row) for row in rows}))
            if shape != (num_layers, [num_query_heads]):
                raise ConfigError(
                    f"rules: {name} has {shape[0]} layers of {shape[1]} query heads; this model "
                    f"has {num_layers} of {num_query_heads}"
                )

    def query_head_spans(self) -> list[list[Span]]:
        """By layer and query head.

        Raises:
            ConfigError: a value out of its range.
        """
        return [
            [_span(layer, head, *rule) for head, rule in enumerate(zip(*rules, strict=True))]
            for layer, rules in enumerate(zip(self.alphas, self.betas, strict=True))
        ]

    def kv_head_spans(self, num_kv_heads: int, max_tokens: int) -> list[list[Span]]:
        """By layer and KV head: what any query head of its group sees.

        Args:
            num_kv_heads: of each layer; query heads of a group stand side by side.
            max_tokens: of the longest request.
        """
        layers = self.query_head_spans()
        group = len(layers[0]) // num_kv_heads
        return [
            [
                covering(heads[first : first + group], max_tokens)
                for first in range(0, len(heads), group)
            ]
            for heads in layers
        ]


def _span(layer: int, head: int, alpha: float, beta: float) -> Span:
    where = f"rules of layer {layer}, query head {head}"
    if not 0 <= beta <= 1:
        raise ConfigError(f"{where}: beta is {beta}; it must be between 0 and 1")
    if not abs(alpha) <= MAX_TOKENS:
        raise ConfigError(f"{where}: alpha is {alpha}; it must be at most {MAX_TOKENS} tokens")
    # Rounded towards seeing more.
    alpha_tokens, beta_64ths = math.ceil(alpha) - SINK_TOKENS, math.ceil(beta * BETA_UNIT)
    return Span(SINK_TOKENS, LEAST_TOKENS - SINK_TOKENS, alpha_tokens, beta_64ths).simplest


def load_rules(path: Path) -> PublishedRules:
    """Reads a file in MoA's format.

    Raises:
        ConfigError: not a regular file, too large, not JSON, or not in this format.
    """
    named = f"rules {path}"
    text = read_text(path, MAX_RULES_BYTES, named)
    try:
        return PublishedRules.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(step) for step in first["loc"]) or "the file"
        raise ConfigError(
            f'{named} is not in MoA\'s format, {{"alphas": [[...]], "betas": [[...]]}} by layer '
            f"and query head: {where}: {first['msg']}"
        ) from None
