"""Profiles and rules for MOA, made by hand: what its tests serve."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from attn_backends.methods.moa import METHOD, HeadSpans
from tests.profiles import write_section

SINK_TOKENS, FLOOR_TOKENS = 40, 128
CLASSES = [[0, 64], [200, 0], [-64, 24]]  # full heads, a window, and one that grows


def write_profile(
    path: Path, num_layers: int, num_kv_heads: int, classes: list[list[int]] | None = None
) -> str:
    """Classes by turns, in layers and heads: equally many heads in each of up to three.

    Args:
        path: of the file.
        num_layers: of the model.
        num_kv_heads: of each layer.
        classes: ``[alpha_tokens, beta_64ths]`` of each.

    Returns:
        The path, as settings take it.
    """
    classes = classes or CLASSES
    section = HeadSpans(
        sink_tokens=SINK_TOKENS,
        floor_tokens=FLOOR_TOKENS,
        classes=classes,
        class_of_head=[
            [(layer + head) % len(classes) for head in range(num_kv_heads)]
            for layer in range(num_layers)
        ],
    )
    return write_section(path, METHOD.name, section, num_layers, num_kv_heads)


def write_rules(
    path: Path, num_layers: int, num_query_heads: int, *rules: tuple[float, float]
) -> str:
    """A file in MoA's published format, the same in every layer.

    Args:
        path: of the file.
        num_layers: of the model.
        num_query_heads: of each layer.
        rules: alpha in tokens and beta, a share, of query heads by turns; none: all see everything.

    Returns:
        The path, as settings take it.
    """
    heads = [*itertools.islice(itertools.cycle(rules or [(0, 1)]), num_query_heads)]
    alphas, betas = ([list(values)] * num_layers for values in zip(*heads, strict=True))
    path.write_text(json.dumps({"alphas": alphas, "betas": betas}))
    return str(path)
