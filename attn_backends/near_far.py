"""Sinks and a window as attention over plain ranges of keys, for kernels that have no sinks.

A query at position ``p`` sees the first S tokens and the last W. While ``p < S + W`` these meet and
it sees all that stand before it: such a query is *near*. From then on it is *far*: all of the
sinks and its window lie apart, and their results are merged by log-sum-exp. So each row becomes
two, cut where its first far query stands, and three launches serve them, each with no keys for
the rows that are not its own: causal (near), windowed (far), all sinks unmasked (far). Where to
cut depends on lengths, which stay on the device; the launches depend on the number of rows alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attn_backends.batch import PagedBatch


@dataclass(frozen=True)
class NearFar:
    """The rows of a batch, cut in two: row ``2r`` holds row ``r``'s near queries, ``2r + 1`` its
    far ones. Either may be empty.

    Attributes:
        query_start_loc: ``[2 * num_reqs + 1]`` int32, into the same query tokens.
        block_table: ``[2 * num_reqs, max_blocks]`` int32.
        near_keys: ``[2 * num_reqs]`` int32, keys up to the last near query; 0 in far rows.
        far_keys: the same up to the last far query, a window apart; 0 in near rows.
        sink_keys: the same, the sinks; 0 in near rows.
    """

    query_start_loc: torch.Tensor
    block_table: torch.Tensor
    near_keys: torch.Tensor
    far_keys: torch.Tensor
    sink_keys: torch.Tensor

    @classmethod
    def of(cls, batch: PagedBatch, sink_tokens: int, window_tokens: int) -> NearFar:
        """Cuts each row; no host synchronisation.

        Args:
            batch: rows of any number of query tokens.
            sink_tokens: S, at least 1.
            window_tokens: W, at least 1, the query's own token included.
        """
        reach = sink_tokens + window_tokens
        starts = batch.query_start_loc[:-1]
        query_lens = batch.query_start_loc[1:] - starts
        first_positions = batch.seq_lens - query_lens
        num_near = torch.minimum((reach - first_positions).clamp_min(0), query_lens)
        cuts = batch.query_start_loc.new_empty(2 * batch.num_reqs + 1)
        cuts[0::2] = batch.query_start_loc
        cuts[1::2] = starts + num_near
        keys = batch.seq_lens.new_zeros(3, batch.num_reqs, 2)
        # A row without near queries has no use for keys; the bound is the launch's.
        keys[0, :, 0] = (first_positions + num_near).clamp_max(reach)
        keys[1, :, 1] = batch.seq_lens
        keys[2, :, 1] = sink_tokens
        table = batch.block_table.repeat_interleave(2, dim=0)
        return cls(cuts, table, *keys.flatten(1).unbind())
