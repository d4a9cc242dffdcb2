"""Layers whose KV heads keep different blocks: every head is served as a row of its own.

Each KV head then has the block table of its KV group, and its blocks are *tiles* of one pool
``[num_tiles, 1, block_size, head_size]``: block ``b`` of head ``h`` is tile
``tile_base[h] + tile_stride * b``. The kernels know nothing of it. They see ``R * H`` rows of one
KV head, in (row, head) order for decode and in (head, row) order for prefill, where a row's query
tokens must lie together; every row's arithmetic, and so its bits, are those of the layer unfolded.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from attn_backends.batch import BlockSelection, PagedBatch, SpanRule


@dataclass(frozen=True)
class FoldBuffers:
    """Where decode rows are folded to: one per device for all layers with as many KV heads, since
    each overwrites it before its own launch. Addresses stay, as CUDA graphs need it.
    """

    tiles: torch.Tensor  # [max_num_reqs * num_kv_heads, max_blocks] int32
    seq_lens: torch.Tensor  # [max_num_reqs * num_kv_heads] int32
    query_start_loc: torch.Tensor  # [max_num_reqs * num_kv_heads + 1] int32: 0, 1, 2, ...

    @classmethod
    def of(
        cls, max_num_reqs: int, num_kv_heads: int, max_blocks: int, device: torch.device
    ) -> FoldBuffers:
        """Buffers for rows of at most ``max_blocks`` blocks."""
        rows = max_num_reqs * num_kv_heads
        return cls(
            torch.zeros(rows, max_blocks, dtype=torch.int32, device=device),
            torch.zeros(rows, dtype=torch.int32, device=device),
            torch.arange(rows + 1, dtype=torch.int32, device=device),
        )


@dataclass(frozen=True)
class HeadTiles:
    """Where one layer's KV heads lie in the pool; fixed once caches are bound.

    Attributes:
        group_of_head: the KV group of each head, as an index into tables and slot mappings.
        tile_base: ``[num_kv_heads]`` int32.
        tile_stride: tiles from a head's block to its next.
        block_size: tokens per block.

    Raises:
        ValueError: a head without a base.
    """

    group_of_head: tuple[int, ...]
    tile_base: torch.Tensor
    tile_stride: int
    block_size: int

    def __post_init__(self) -> None:
        if len(self.tile_base) != self.num_kv_heads:
            raise ValueError(
                f"tile_base has {len(self.tile_base)} entries; group_of_head, {self.num_kv_heads}"
            )

    @property
    def num_kv_heads(self) -> int:
        """Of the layer."""
        return len(self.group_of_head)

    def slots(self, slot_mappings: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Where ``cache_write`` puts ``fold_keys(key)`` in the pool.

        Args:
            slot_mappings: one per KV group, ``[num_tokens]`` int64, as in ``cache_write``.

        Returns:
            ``[num_tokens * num_kv_heads]`` int64; negative where the group's slot is.
        """
        of_heads = torch.stack([slot_mappings[group] for group in self.group_of_head], dim=1)
        tiles = self.tile_base + self.tile_stride * (of_heads // self.block_size)
        slots = tiles * self.block_size + of_heads % self.block_size
        return slots.masked_fill_(of_heads < 0, -1).flatten()


@dataclass(frozen=True)
class HeadTables:
    """The block tables of one layer's KV heads in one step.

    Attributes:
        tiles: where the heads lie.
        tables: one per KV group, ``[num_reqs, max_blocks]`` int32, all of one shape. What stands
            past a row's blocks (0 or -1) is not read; it still becomes a tile of the pool.
        buffers: of decode rows.

    Raises:
        ValueError: a head of a group without a table.
    """

    tiles: HeadTiles
    tables: tuple[torch.Tensor, ...]
    buffers: FoldBuffers

    def __post_init__(self) -> None:
        groups = self.tiles.group_of_head
        if not set(groups) <= set(range(len(self.tables))):
            raise ValueError(f"group_of_head is {groups}; there are {len(self.tables)} tables")

    @property
    def num_kv_heads(self) -> int:
        """Of the layer."""
        return self.tiles.num_kv_heads

    @cached_property
    def _runs(self) -> tuple[tuple[int, slice], ...]:
        """Neighbouring heads of one group, which one operation serves."""
        runs, first = [], 0
        for group, heads in itertools.groupby(self.tiles.group_of_head):
            last = first + len(list(heads))
            runs.append((group, slice(first, last)))
            first = last
        return tuple(runs)

    def rows(self, first: int, last: int) -> HeadTables:
        """The tables of rows ``[first, last)``, as ``PagedBatch.rows``, with the same buffers."""
        return replace(self, tables=tuple(table[first:last] for table in self.tables))

    def decode_batch(self, batch: PagedBatch) -> PagedBatch:
        """Decode rows, once per KV head, in (row, head) order; the table holds tiles.

        Of a batch that a graph captures, ``max_seq_len`` must bound what is replayed. Nothing is
        allocated; the batch holds until the next layer's is made.

        Args:
            batch: of the rows of ``tables``, one query token each; its ``block_table`` is not read.
        """
        heads = self.num_kv_heads
        num_rows, width = batch.num_reqs * heads, self._width(batch)
        tiles, seq_lens = self.buffers.tiles[:num_rows], self.buffers.seq_lens[:num_rows]
        self._write_tiles(tiles.view(batch.num_reqs, heads, -1)[..., :width])
        seq_lens.view(batch.num_reqs, heads).copy_(batch.seq_lens[:, None])
        return replace(
            batch,
            query_start_loc=self.buffers.query_start_loc[: num_rows + 1],
            seq_lens=seq_lens,
            block_table=tiles[:, :width],
            num_reqs=num_rows,
            num_tokens=num_rows,
        )

    def prefill_batch(self, batch: PagedBatch) -> PagedBatch:
        """Rows of any number of query tokens, once per KV head, in (head, row) order: the batch of
        ``fold_prefill(query)``. Freshly allocated.

        Args:
            batch: of the rows of ``tables``; its ``num_tokens`` is exact, and its ``block_table``
                is not read.
        """
        heads, rows = self.num_kv_heads, batch.num_reqs
        device = batch.seq_lens.device
        num_tokens = heads * batch.num_tokens
        tiles = torch.empty(heads, rows, self._width(batch), dtype=torch.int32, device=device)
        self._write_tiles(tiles.transpose(0, 1))
        starts = torch.full((heads * rows + 1,), num_tokens, dtype=torch.int32, device=device)
        first_tokens = torch.arange(heads, device=device)[:, None] * batch.num_tokens
        starts[:-1].view(heads, rows).copy_(batch.query_start_loc[:-1] + first_tokens)
        return replace(
            batch,
            query_start_loc=starts,
            seq_lens=batch.seq_lens.repeat(heads),
            block_table=tiles.flatten(0, 1),
            num_reqs=heads * rows,
            num_tokens=num_tokens,
        )

    def _width(self, batch: PagedBatch) -> int:
        return min(self.tables[0].shape[1], -(-batch.max_seq_len // self.tiles.block_size))

    def _write_tiles(self, tiles: torch.Tensor) -> None:
        """Args: tiles: ``[num_reqs, num_kv_heads, width]`` int32, strided as it likes."""
        num_reqs, _, width = tiles.shape
        for group, heads in self._runs:
            blocks = self.tables[group][:num_reqs, None, :width]
            base = self.tiles.tile_base[heads, None]
            torch.add(base, blocks, alpha=self.tiles.tile_stride, out=tiles[:, heads])
        tiles.clamp_(min=0)  # a padding id of -1


def fold_query(query: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """Decode rows' queries ``[R, H * G, D]`` as ``[R * H, G, D]``: a view, or a copy where they are
    part of a wider tensor (of queries, keys and values, say).
    """
    return query.reshape(len(query) * num_kv_heads, -1, query.shape[2])


def fold_out(out: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """Decode rows' output ``[R, H * G, D]`` as ``[R * H, G, D]``, a view.

    Raises:
        RuntimeError: ``out`` is not contiguous.
    """
    return out.view(len(out) * num_kv_heads, -1, out.shape[2])


def fold_heads(tensor: torch.Tensor) -> torch.Tensor:
    """``[R, H, ...]`` as ``[R * H, 1, ...]``, a view: what is known of rows and KV heads, such as
    the masses of blocks.

    Raises:
        RuntimeError: ``tensor`` is not contiguous.
    """
    return tensor.view(-1, 1, *tensor.shape[2:])


def fold_keys(keys: torch.Tensor) -> torch.Tensor:
    """Keys or values of tokens, ``[T, H, D]`` as ``[T * H, 1, D]``; a copy as in ``fold_query``."""
    return fold_heads(keys.contiguous())


def fold_selection(selection: BlockSelection) -> BlockSelection:
    """A selection of decode rows; views."""
    return BlockSelection(fold_heads(selection.logical_blocks), fold_heads(selection.counts))


def fold_rule(rule: SpanRule | None) -> SpanRule | None:
    """The rule of decode rows; a view."""
    return None if rule is None else SpanRule(fold_heads(rule.values))


def fold_prefill_rule(rule: SpanRule | None) -> SpanRule | None:
    """The rule of ``prefill_batch``."""
    return None if rule is None else SpanRule(fold_heads(rule.values.transpose(0, 1).contiguous()))


def fold_prefill(query: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """Queries ``[T, H * G, D]`` head by head, ``[H * T, G, D]``; a copy."""
    by_token = query.view(len(query), num_kv_heads, -1, query.shape[2])
    return by_token.transpose(0, 1).flatten(0, 1)


def unfold_prefill(folded: torch.Tensor, out: torch.Tensor) -> None:
    """Writes the output of ``fold_prefill``'s queries, ``[H * T, G, D]``, to ``out``,
    ``[T, H * G, D]``.
    """
    num_tokens, _, head_size = out.shape
    by_head = folded.view(-1, num_tokens, folded.shape[1], head_size)
    out.view(num_tokens, len(by_head), -1, head_size).copy_(by_head.transpose(0, 1))
