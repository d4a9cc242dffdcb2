"""Layers whose KV heads keep different blocks: every head is served as a row of its own.

Each KV head then has the block table of its KV group, and its blocks are *tiles* of one pool
``[num_tiles, 1, block_size, head_size]``: block ``b`` of a head is tile
``tile_base + tile_stride * b``. The kernels know nothing of it. They see ``R * H`` rows of one KV
head, in (row, head) order for decode and in (head, row) order for prefill, where a row's query
tokens must lie together; every row's arithmetic, and so its bits, are those of the layer unfolded.

What layers share is made once per step (``HeadTables``), the rest by each (``HeadPlaces``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from attn_backends.batch import BlockSelection, PagedBatch, SpanRule

NO_SLOT = -(1 << 62)  # negative whatever base is added


@dataclass(frozen=True)
class HeadRows:
    """Rows of a step, once per KV head. Each layer writes its tiles before its own launch."""

    batch: PagedBatch  # of R * H rows and one KV head
    tile_offsets: torch.Tensor  # [R, num_groups, width] int32: tile_stride * block, by KV group
    tiles: torch.Tensor  # [R, H, width] int32, the view of ``batch.block_table``


@dataclass(frozen=True)
class HeadTables:
    """What the layers of one KV geometry share: sizes, and buffers whose addresses stay, as CUDA
    graphs need it.
    """

    num_kv_heads: int
    block_size: int  # tokens
    tile_stride: int  # tiles from a block of a head to its next
    tile_offsets: torch.Tensor  # [max_num_reqs, num_groups, max_blocks] int32
    slot_offsets: torch.Tensor  # [max_num_tokens, num_groups] int64
    tiles: torch.Tensor  # [max_num_reqs * num_kv_heads, max_blocks] int32
    seq_lens: torch.Tensor  # [max_num_reqs * num_kv_heads] int32
    query_start_loc: torch.Tensor  # [max_num_reqs * num_kv_heads + 1] int32: 0, 1, 2, ...

    @classmethod
    def of(
        cls,
        num_kv_heads: int,
        num_groups: int,
        block_size: int,
        tile_stride: int,
        *,
        max_num_reqs: int,
        max_num_tokens: int,
        max_blocks: int,
        device: torch.device,
    ) -> HeadTables:
        """Buffers for steps of that size."""
        rows = max_num_reqs * num_kv_heads

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            num_kv_heads,
            block_size,
            tile_stride,
            tile_offsets=zeros(max_num_reqs, num_groups, max_blocks),
            slot_offsets=zeros(max_num_tokens, num_groups, dtype=torch.int64),
            tiles=zeros(rows, max_blocks),
            seq_lens=zeros(rows),
            query_start_loc=torch.arange(rows + 1, dtype=torch.int32, device=device),
        )

    def decode_rows(self, batch: PagedBatch, tables: Sequence[torch.Tensor]) -> HeadRows:
        """Decode rows in (row, head) order, in the persistent buffers.

        Args:
            batch: one query token per row; its ``block_table`` is not read. Where a graph captures
                it, ``max_seq_len`` must bound what is replayed.
            tables: one per KV group, ``[num_reqs, max_blocks]`` int32. What stands past a row's
                blocks (0 or -1) is not read; it still becomes a tile of the pool.
        """
        heads, width = self.num_kv_heads, self._width(batch)
        num_rows = batch.num_reqs * heads
        offsets = self.tile_offsets[: batch.num_reqs, :, :width]
        self._write_offsets(tables, offsets)
        seq_lens, tiles = self.seq_lens[:num_rows], self.tiles[:num_rows, :width]
        seq_lens.view(batch.num_reqs, heads).copy_(batch.seq_lens[:, None])
        folded = replace(
            batch,
            query_start_loc=self.query_start_loc[: num_rows + 1],
            seq_lens=seq_lens,
            block_table=tiles,
            num_reqs=num_rows,
            num_tokens=num_rows,
        )
        return HeadRows(folded, offsets, tiles.view(batch.num_reqs, heads, width))

    def prefill_rows(self, batch: PagedBatch, tables: Sequence[torch.Tensor]) -> HeadRows:
        """Rows of any number of query tokens in (head, row) order, as ``fold_prefill`` orders their
        queries; freshly allocated.

        Args:
            batch: its ``num_tokens`` is exact, and its ``block_table`` is not read.
            tables: as in ``decode_rows``, of these rows.
        """
        heads, rows, width = self.num_kv_heads, batch.num_reqs, self._width(batch)
        device, num_tokens = batch.seq_lens.device, self.num_kv_heads * batch.num_tokens
        offsets = self.tile_offsets.new_empty(rows, len(tables), width)
        self._write_offsets(tables, offsets)
        tiles = self.tiles.new_empty(heads, rows, width)
        starts = torch.full((heads * rows + 1,), num_tokens, dtype=torch.int32, device=device)
        first_tokens = torch.arange(heads, device=device)[:, None] * batch.num_tokens
        starts[:-1].view(heads, rows).copy_(batch.query_start_loc[:-1] + first_tokens)
        folded = replace(
            batch,
            query_start_loc=starts,
            seq_lens=batch.seq_lens.repeat(heads),
            block_table=tiles.flatten(0, 1),
            num_reqs=heads * rows,
            num_tokens=num_tokens,
        )
        return HeadRows(folded, offsets, tiles.transpose(0, 1))

    def write_slots(self, slot_mappings: Sequence[torch.Tensor]) -> torch.Tensor:
        """What ``HeadPlaces.slots`` starts from, in the persistent buffer.

        Args:
            slot_mappings: one per KV group, ``[num_tokens]`` int64, as in ``cache_write``.

        Returns:
            ``[num_tokens, num_groups]`` int64: slots of a head whose tiles start at 0.
        """
        offsets = self.slot_offsets[: len(slot_mappings[0])]
        for slots, into in zip(slot_mappings, offsets.unbind(1), strict=True):
            in_block = slots % self.block_size
            torch.mul(slots - in_block, self.tile_stride, out=into)
            into.add_(in_block).masked_fill_(slots < 0, NO_SLOT)
        return offsets

    def _width(self, batch: PagedBatch) -> int:
        return min(self.tiles.shape[1], -(-batch.max_seq_len // self.block_size))

    def _write_offsets(self, tables: Sequence[torch.Tensor], offsets: torch.Tensor) -> None:
        num_reqs, _, width = offsets.shape
        for table, into in zip(tables, offsets.unbind(1), strict=True):
            torch.mul(table[:num_reqs, :width], self.tile_stride, out=into)
        offsets.clamp_(min=0)  # a padding id of -1


class HeadPlaces:
    """Where one layer's KV heads lie.

    Args:
        group_of_head: the KV group of each head, as an index into a step's tables.
        tile_base: the tile of each head's block 0.
        block_size: tokens per block.
        device: of the tables.

    Raises:
        ValueError: a head without a base.
    """

    def __init__(
        self,
        group_of_head: Sequence[int],
        tile_base: Sequence[int],
        block_size: int,
        device: torch.device,
    ) -> None:
        if len(group_of_head) != len(tile_base):
            raise ValueError(
                f"group_of_head has {len(group_of_head)} entries, tile_base {len(tile_base)}"
            )
        self._groups = torch.tensor(group_of_head, device=device)
        self._slot_base = torch.tensor(tile_base, device=device) * block_size
        self._tile_base = torch.tensor(tile_base, dtype=torch.int32, device=device)[:, None]

    def batch(self, rows: HeadRows) -> PagedBatch:
        """The rows with this layer's tiles; it holds until the next layer's is made."""
        offsets = rows.tile_offsets.index_select(1, self._groups)
        torch.add(offsets, self._tile_base, out=rows.tiles)
        return rows.batch

    def slots(self, slot_offsets: torch.Tensor) -> torch.Tensor:
        """Where ``cache_write`` puts ``fold_keys(key)`` in the pool; negative for padding.

        Args:
            slot_offsets: of ``HeadTables.write_slots``.

        Returns:
            ``[num_tokens * num_kv_heads]`` int64.
        """
        return slot_offsets.index_select(1, self._groups).add_(self._slot_base).flatten()


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
    return None if rule is None else SpanRule(fold_heads(rule.values), rule.span)


def fold_prefill_rule(rule: SpanRule | None) -> SpanRule | None:
    """The rule of ``HeadTables.prefill_rows``."""
    if rule is None:
        return None
    return SpanRule(fold_heads(rule.values.transpose(0, 1).contiguous()), rule.span)


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
