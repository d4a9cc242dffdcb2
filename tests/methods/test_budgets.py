"""What a row is counted as is what its anchors are given."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from attn_backends.batch import RowOptions
from attn_backends.method import Geometry
from attn_backends.methods import load_method
from tests.batches import anchor_state, labels, step_rows

CPU = torch.device("cpu")
TIDAL = load_method("TIDAL_DECODE")
BLOCK = 32


def _labels_and_budgets(
    settings: dict[str, Any], seq_lens: list[int], options: dict[int, RowOptions]
) -> tuple[list[tuple[str, str]], list[int]]:
    geometry = Geometry(6, 2, 4, 64, BLOCK, 16, 8192)
    config = TIDAL.config_cls(**TIDAL.config_cls.compose(settings))
    selector = TIDAL.make_selector(config, TIDAL.schedule(config, geometry), geometry, CPU)
    plan = selector.plan(step_rows(seq_lens, options))
    return labels(plan), anchor_state(plan).budget_blocks.tolist()


@pytest.mark.parametrize("seq_len", [2080, 2112, 2113])
def test_a_scaled_budget_is_rounded_once(seq_len: int) -> None:
    options = {0: RowOptions(budget_factor=2.0)}
    settings = {"budget_tokens": 1026, "min_context_tokens": 0}
    (label,), (budget,) = _labels_and_budgets(settings, [seq_len], options)
    assert budget == 66  # 33 blocks, twice
    assert label == ("sparse", "everything_kept" if seq_len <= 2112 else "selected")


@pytest.mark.parametrize("seed", range(20))
def test_everything_kept_says_that_the_budget_covers_the_context(seed: int) -> None:
    source = random.Random(seed)
    policy = {"budgets": [{"up_to_tokens": 1500, "budget_tokens": source.choice([257, "all"])}]}
    settings = {
        "budget_tokens": source.randrange(96, 2000),
        "budget_fraction": source.choice([0.0, 0.3, 0.501, 1.0]),
        "min_context_tokens": source.choice([0, 500]),
        "policy": policy,
    }
    seq_lens = [source.randrange(1, 4000) for _ in range(12)]
    choices = [
        RowOptions(is_dense=True),
        RowOptions(budget_tokens=source.randrange(96, 3000)),
        RowOptions(budget_factor=source.choice([0.5, 2.0, 1.7])),
    ]
    options = {row: source.choice(choices) for row in range(0, 12, 2)}
    labels, budgets = _labels_and_budgets(settings, seq_lens, options)
    for (path, reason), budget, seq_len in zip(labels, budgets, seq_lens, strict=True):
        reads_all = path == "dense" or reason == "everything_kept"
        assert reads_all == (budget * BLOCK >= seq_len)
