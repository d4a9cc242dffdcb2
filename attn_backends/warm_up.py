"""Every kernel once, before the first request: what is compiled in service, a request waits for.

Triton compiles a kernel anew for other types, and for arguments that are 1 or that 16 divides: row
counts, token counts, strides, and addresses of rows behind decode rows. Kernels may also split rows
by how many there are, in powers of two. So batches of such sizes go the way of every layer, on the
layer's own cache and block table. Their rows are short: how long a row is changes no launch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch

from attn_backends.batch import PagedBatch
from attn_backends.head_tables import HeadPlaces, HeadTables
from attn_backends.layer_step import LayerStep, StepBatch, ops_of
from attn_backends.method import Selector, StepRows
from attn_backends.ops.resolution import Ops
from attn_backends.plan import LayerPlan
from attn_backends.split_step import SplitLayerStep, SplitRows

ROW_COUNTS = (0, 1, 2, 16)  # of decode rows, and of prefill rows beside them
PROMPT_TOKENS = (17, 32)  # of a prefill row
# Tokens of the longest prefill row: tiles of queries grow with it, up to 128 of them.
SHORT_PROMPTS = (2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class WarmLayer:
    """What a layer is served with.

    Attributes:
        ops: without and with a token rule.
        views: key and value cache, ``[num_blocks, num_kv_heads, block_size, head_size]``; of the
            pool's tiles where heads have caches of their own.
        num_query_heads: of the layer.
        scale: of its scores.
        places: of its heads, where they have caches of their own.
    """

    ops: tuple[Ops, Ops]
    views: tuple[torch.Tensor, torch.Tensor]
    num_query_heads: int
    scale: float
    places: HeadPlaces | None = None


@dataclass(frozen=True)
class WarmHeads:
    """What layers share whose heads have caches of their own.

    Attributes:
        tables: sizes and buffers.
        block_tables: of each KV group of heads, as ``warm_up`` takes one.
    """

    tables: HeadTables
    block_tables: Sequence[torch.Tensor]

    def rows(self, step: StepBatch, num_rows: int) -> SplitRows:
        """The rows of a step by head."""
        tables = [table[:num_rows] for table in self.block_tables]
        return SplitRows.of(step, self.tables, tables)


@dataclass(frozen=True)
class Limits:
    """What the engine admits: rows and tokens of a step, tokens of a row."""

    max_num_reqs: int
    max_num_tokens: int
    max_model_len: int


def batch_sizes(limits: Limits) -> Iterator[tuple[int, int, int]]:
    """Decode rows, prefill rows and tokens of each prefill row, as far as a step may have them."""
    most_decodes = min(limits.max_num_reqs, limits.max_num_tokens)
    for power in range(most_decodes.bit_length()):
        yield 1 << power, 0, 0
    for num_decodes, num_prefills, num_tokens in product(ROW_COUNTS, ROW_COUNTS, PROMPT_TOKENS):
        fits = (
            num_decodes + num_prefills <= limits.max_num_reqs
            and num_decodes + num_prefills * num_tokens <= limits.max_num_tokens
            and num_tokens < limits.max_model_len
        )
        if num_prefills and fits:
            yield num_decodes, num_prefills, num_tokens
    for num_tokens in SHORT_PROMPTS:
        if num_tokens < min(limits.max_model_len, limits.max_num_tokens + 1):
            yield 0, 1, num_tokens


def warm_up(
    selector: Selector,
    layers: Mapping[int, WarmLayer],
    block_table: torch.Tensor,
    limits: Limits,
    heads: WarmHeads | None = None,
) -> None:
    """Runs every op that these layers use. Nothing is written but selections and masses, which
    every step writes anew.

    Args:
        selector: of the method.
        layers: by layer index.
        block_table: that steps use, ``[max_num_reqs, max_blocks]`` int32; what it holds are blocks
            of the layers' caches.
        limits: of the engine.
        heads: where layers have ``places``.
    """
    for num_decodes, num_prefills, num_tokens in batch_sizes(limits):
        query_lens = [1] * num_decodes + [num_tokens] * num_prefills
        # Decode launches are told the longest there may be.
        for max_seq_len in {num_tokens + 1, limits.max_model_len} if num_prefills else {1}:
            batch = _batch(query_lens, block_table, max_seq_len)
            step = StepBatch.split(batch, num_decodes, limits.max_model_len)
            seq_lens = batch.seq_lens[:num_decodes]
            plan = selector.plan(StepRows(seq_lens, seq_lens.cpu(), batch.num_reqs))
            planned = ((plan.layers[index], one) for index, one in layers.items())
            rows = None if heads is None else heads.rows(step, batch.num_reqs)
            _attend(planned, step, rows)


def _batch(query_lens: list[int], block_table: torch.Tensor, max_seq_len: int) -> PagedBatch:
    """Rows of one token more than they ask about."""
    device = block_table.device
    lengths = torch.tensor(query_lens, dtype=torch.int32)
    starts = torch.zeros(len(query_lens) + 1, dtype=torch.int32)
    torch.cumsum(lengths, 0, out=starts[1:])
    return PagedBatch(
        query_start_loc=starts.to(device),
        seq_lens=(lengths + 1).to(device),
        block_table=block_table[: len(query_lens)],
        num_reqs=len(query_lens),
        num_tokens=sum(query_lens),
        max_query_len=max(query_lens),
        max_seq_len=max_seq_len,
    )


def _attend(
    planned: Iterable[tuple[LayerPlan, WarmLayer]], step: StepBatch, rows: SplitRows | None
) -> None:
    for plan, one in planned:
        if plan.is_prefill_plain and step.prefill is not None:
            # A preempted request's answer is computed again under the rule.
            _attend([(replace(plan, is_prefill_plain=False), one)], step, rows)
        key_cache = one.views[0]
        shape = (step.num_tokens, one.num_query_heads, key_cache.shape[3])
        query = torch.zeros(shape, dtype=key_cache.dtype, device=key_cache.device)
        layer = LayerStep(plan, step, ops_of(plan, one.ops), one.views, one.scale)
        if rows is not None and one.places is not None:
            SplitLayerStep(layer, rows, one.places).attend(query, torch.empty_like(query))
        else:
            layer.attend(query, torch.empty_like(query))
