"""A transformers attention function that records attention mass, or simulates a schedule.

Registered through transformers' ``AttentionInterface``: no model code is copied or patched.
Batch 1. Prefill is dense; a single-token step follows the schedule under test.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from attn_backends.batch import BlockSelection
from attn_backends.ops.block_topk import api as block_topk
from attn_backends.plan import LayerRole, LayerSchedule

NAME = "vllm_ext_probe"


@dataclass(frozen=True)
class Budget:
    """What a KV head may read in a reuse layer, in KV blocks."""

    block_size: int
    budget_blocks: int
    sink_blocks: int
    recent_blocks: int


@dataclass
class Probe:
    """State shared by the attention layers of one model.

    Attributes:
        budget: blocks that reuse layers may read.
        positions: query positions whose mass is recorded in the next prefill, or None.
        mass: per layer ``[num_positions, num_kv_heads, num_blocks]``, filled by that prefill.
        schedule: roles of single-token steps; None is dense.
    """

    budget: Budget
    positions: torch.Tensor | None = None
    mass: dict[int, torch.Tensor] = field(default_factory=dict)
    schedule: LayerSchedule | None = None
    _selection: BlockSelection | None = None

    def attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """transformers' attention signature; query ``[1, num_query_heads, query_len, head_size]``,
        key and value ``[1, num_kv_heads, seq_len, head_size]``.
        """
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        layer: int = module.layer_idx
        query_len, seq_len = query.shape[2], key.shape[2]
        mask = None
        if query_len == 1 and self.schedule is not None:
            mask = self._step_mask(layer, query, key, scale)
        elif query_len != seq_len and query_len > 1:
            first = seq_len - query_len
            mask = torch.ones(query_len, seq_len, dtype=torch.bool).tril(first)[None, None]
        if self.positions is not None and query_len == seq_len:
            self.mass[layer] = self._positions_mass(query, key, scale)
        out = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None and query_len > 1,
            scale=scale,
            enable_gqa=True,
        )
        return out.transpose(1, 2).contiguous(), None

    def block_mass(self, query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
        """Block masses of query tokens that see all keys but their own future.

        Args:
            query: ``[num_query_heads, num_positions, head_size]``.
            key: ``[num_kv_heads, seq_len, head_size]``.
            scale: factor on the logits.

        Returns:
            ``[num_positions, num_kv_heads, num_blocks]``, summed over each group's heads.
        """
        num_kv_heads, seq_len = key.shape[:2]
        # [num_kv_heads, group, num_positions, head_size]
        grouped = query.reshape(num_kv_heads, -1, *query.shape[1:])
        logits = torch.einsum("hgpd,htd->hgpt", grouped, key) * scale
        if self.positions is not None:
            future = torch.arange(seq_len) > self.positions[:, None]
            logits = logits.masked_fill(future, -torch.inf)
        weights = logits.softmax(-1).sum(1)
        block_size = self.budget.block_size
        weights = pad(weights, (0, -seq_len % block_size))
        blocks = weights.reshape(*weights.shape[:2], -1, block_size)
        return blocks.sum(-1).transpose(0, 1)

    def _positions_mass(self, query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
        assert self.positions is not None
        return self.block_mass(query[0][:, self.positions], key[0], scale)

    def _step_mask(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, scale: float
    ) -> torch.Tensor | None:
        assert self.schedule is not None
        role = self.schedule.roles[layer]
        if role is LayerRole.ANCHOR:
            mass = self.block_mass(query[0], key[0], scale)
            self._selection = select_blocks(mass, [key.shape[2]], self.budget)
        if role is not LayerRole.REUSE:
            return None
        selection = self._selection
        assert selection is not None
        num_kv_heads, seq_len = key.shape[1:3]
        heads = self.schedule.head_maps.get(layer, tuple(range(num_kv_heads)))
        num_blocks = -(-seq_len // self.budget.block_size)
        visible = torch.zeros(num_kv_heads, num_blocks, dtype=torch.bool)
        for head, source in enumerate(heads):
            count = int(selection.counts[0, source])
            visible[head, selection.logical_blocks[0, source, :count].long()] = True
        tokens = visible.repeat_interleave(self.budget.block_size, dim=1)[:, :seq_len]
        group = query.shape[1] // num_kv_heads
        return tokens.repeat_interleave(group, dim=0)[None, :, None, :]


def select_blocks(mass: torch.Tensor, seq_lens: list[int], budget: Budget) -> BlockSelection:
    """The blocks the served method would select for these masses.

    Args:
        mass: ``[num_rows, num_kv_heads, num_blocks]``.
        seq_lens: tokens of each row.
        budget: blocks per KV head.
    """
    num_rows, num_kv_heads, num_blocks = mass.shape
    selection = BlockSelection(
        torch.empty(num_rows, num_kv_heads, num_blocks, dtype=torch.int32),
        torch.empty(num_rows, num_kv_heads, dtype=torch.int32),
    )
    reference = next(i for i in block_topk.implementations() if i.name == "reference")
    reference.run(
        mass.contiguous(),
        torch.tensor(seq_lens, dtype=torch.int32),
        budget.block_size,
        torch.full((num_rows,), budget.budget_blocks, dtype=torch.int32),
        budget.sink_blocks,
        budget.recent_blocks,
        selection,
    )
    return selection


def load_probed_model(path: str, probe: Probe) -> Any:
    """The checkpoint in transformers, fp32, its attention going through the probe."""
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register(NAME, probe.attend)
    model: Any = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation=NAME
    )
    return model.eval()
