"""Batches as a decode step has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from attn_backends.batch import PagedBatch, RowOptions
from attn_backends.method import Geometry, StepRows
from attn_backends.plan import Anchor, AnchorState, StepPlan

SIX_LAYERS = Geometry(
    num_layers=6,
    num_kv_heads=2,
    num_query_heads=6,
    head_size=64,
    block_size=32,
    max_num_reqs=4,
    max_model_len=4096,
)


def decode_batch(seq_lens: list[int], block_table: torch.Tensor | None = None) -> PagedBatch:
    """One query token per row.

    Args:
        seq_lens: tokens of each row, the current one included.
        block_table: of selections alone, which read no cache, it does not matter.
    """
    rows = len(seq_lens)
    if block_table is None:
        block_table = torch.zeros(rows, 256, dtype=torch.int32)
    return PagedBatch(
        query_start_loc=torch.arange(rows + 1, dtype=torch.int32),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        block_table=block_table,
        num_reqs=rows,
        num_tokens=rows,
        max_query_len=1,
        max_seq_len=max(seq_lens),
    )


def step_rows(
    seq_lens: Sequence[int],
    options: Mapping[int, RowOptions] | None = None,
    request_ids: Sequence[str | None] = (),
    num_prefills: int = 0,
) -> StepRows:
    """What a selector is told of a step."""
    lengths = torch.tensor(seq_lens, dtype=torch.int32)
    num_rows = len(seq_lens) + num_prefills
    return StepRows(lengths, lengths, num_rows, request_ids, options or {})


def anchor_state(plan: StepPlan) -> AnchorState:
    """What the anchors of a step share."""
    ways = (layer.decode for layer in plan.layers.values())
    return next(way.state for way in ways if isinstance(way, Anchor))


def labels(plan: StepPlan) -> list[tuple[str, str]]:
    """Of the metric, by decode row."""
    return [reason.value for reason in plan.reasons]
