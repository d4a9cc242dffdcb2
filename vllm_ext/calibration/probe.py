"""A transformers attention function that measures errors of reuse, or simulates a schedule.

Registered through transformers' ``AttentionInterface``: no model code is copied or patched.
Batch 1. Prefill is dense; tokens after a cached prompt follow the schedule under test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

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


@dataclass(frozen=True)
class LayerPass:
    """A layer's attention in a prefill, about to be computed.

    Attributes:
        module: the layer's, of transformers.
        query: ``[num_query_heads, seq_len, head_size]``.
        key: ``[num_kv_heads, seq_len, head_size]``, and so the values.
        value: see ``key``.
        scale: factor on the logits.
    """

    module: Any
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float


@dataclass
class Probe:
    """State shared by the attention layers of one model.

    Attributes:
        budget: blocks that sparse layers may read.
        observers: called by every layer of a prefill.
        schedule: roles for query tokens after a cached prompt; None is dense. Every one of
            them is treated as a decode step: it selects for itself and sees nothing later, so
            that one pass over a chunk equals decoding its tokens one by one. Dropped layers are
            dropped in a prefill as well.
    """

    budget: Budget
    observers: list[Callable[[LayerPass], None]] = field(default_factory=list)
    schedule: LayerSchedule | None = None
    _visible_blocks: torch.Tensor | None = None  # [query_len, num_kv_heads, num_blocks]

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
        if self.schedule is not None and self.schedule.roles[layer] is LayerRole.DROP:
            return torch.zeros_like(query).transpose(1, 2).contiguous(), None
        mask = None
        if query_len != seq_len:
            tokens = torch.arange(seq_len, device=key.device)
            mask = (tokens <= tokens[-query_len:, None])[None, None]
            if self.schedule is not None:
                mask = mask & self._visible(layer, query[0], key[0], scale)
        else:
            for observe in self.observers:
                observe(LayerPass(module, query[0], key[0], value[0], scale))
        out = scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
        )
        return out.transpose(1, 2).contiguous(), None

    def _visible(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """What the layer's role lets each query head see: ``[num_query_heads, query_len, seq_len]``
        or, where that is everything, ``[1, 1, 1]``.
        """
        assert self.schedule is not None
        role = self.schedule.roles[layer]
        num_kv_heads, seq_len = key.shape[:2]
        if role in (LayerRole.ANCHOR, LayerRole.SELF):
            positions = torch.arange(seq_len - query.shape[1], seq_len, device=key.device)
            weights = block_weights(query, key, positions, scale, self.budget.block_size)
            self._visible_blocks = chosen_blocks(mass_of(weights), positions, self.budget)
        if role in (LayerRole.DENSE, LayerRole.ANCHOR):
            return torch.ones(1, 1, 1, dtype=torch.bool)
        assert self._visible_blocks is not None
        heads = list(self.schedule.head_maps.get(layer, range(num_kv_heads)))
        blocks = self._visible_blocks[:, heads].transpose(0, 1)
        tokens = blocks.repeat_interleave(self.budget.block_size, dim=2)[..., :seq_len]
        return tokens.repeat_interleave(query.shape[0] // num_kv_heads, dim=0)


class PassObserver:
    """Looks at one dense pass of a probed model; use as a context manager around it.

    Subclasses have ``before_layer``, called with every layer's input ``[seq_len, hidden]``, and
    ``observe``, called as ``Probe.observers`` are.
    """

    def __init__(self, model: Any, probe: Probe) -> None:
        self._model, self._probe = model, probe
        self._handles: list[Any] = []

    def before_layer(self, hidden: torch.Tensor) -> None:
        """A layer begins."""
        raise NotImplementedError

    def observe(self, seen: LayerPass) -> None:
        """A layer's attention is about to be computed."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        def before(module: Any, args: Any, kwargs: Any) -> None:
            self.before_layer((args[0] if args else kwargs["hidden_states"])[0])

        self._handles = [
            layer.register_forward_pre_hook(before, with_kwargs=True)
            for layer in self._model.model.layers
        ]
        self._probe.observers.append(self.observe)
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._probe.observers.remove(self.observe)


def block_weights(
    query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor, scale: float, block_size: int
) -> torch.Tensor:
    """Attention weights of query tokens that see all keys but their own future, by KV block.

    Args:
        query: ``[num_query_heads, num_positions, head_size]``.
        key: ``[num_kv_heads, seq_len, head_size]``.
        positions: ``[num_positions]`` of the query tokens.
        scale: factor on the logits.
        block_size: tokens per block; the last block is padded with zeros.

    Returns:
        ``[num_kv_heads, group, num_positions, num_blocks, block_size]``.
    """
    num_kv_heads, seq_len = key.shape[:2]
    grouped = query.reshape(num_kv_heads, -1, *query.shape[1:])
    logits = torch.einsum("hgpd,htd->hgpt", grouped, key) * scale
    future = torch.arange(seq_len, device=key.device) > positions[:, None]
    weights = logits.masked_fill(future, -torch.inf).softmax(-1)
    padded = pad(weights, (0, -seq_len % block_size))
    return padded.reshape(*padded.shape[:-1], -1, block_size)


def mass_of(weights: torch.Tensor) -> torch.Tensor:
    """Selection masses ``[num_positions, num_kv_heads, num_blocks]`` from ``block_weights``:
    summed over each group's heads, as ``anchor_decode`` does.
    """
    return weights.sum(-1).sum(1).transpose(0, 1).contiguous()


def chosen_blocks(mass: torch.Tensor, positions: torch.Tensor, budget: Budget) -> torch.Tensor:
    """Which blocks are selected, bool, shaped like ``mass``: ``[num_positions, heads, blocks]``."""
    selection = select_blocks(mass, positions + 1, budget)
    index = selection.logical_blocks.long()
    num_blocks = mass.shape[2]
    chosen = torch.zeros(*mass.shape[:2], num_blocks + 1, dtype=torch.bool, device=mass.device)
    chosen.scatter_(2, torch.where(index < 0, num_blocks, index), True)
    return chosen[..., :num_blocks]


def select_blocks(mass: torch.Tensor, seq_lens: torch.Tensor, budget: Budget) -> BlockSelection:
    """The blocks the served method would select for these masses.

    Args:
        mass: ``[num_rows, num_kv_heads, num_blocks]``.
        seq_lens: ``[num_rows]`` tokens.
        budget: blocks per KV head.
    """
    num_rows, num_kv_heads, num_blocks = mass.shape
    selection = BlockSelection(
        mass.new_empty(num_rows, num_kv_heads, num_blocks, dtype=torch.int32),
        mass.new_empty(num_rows, num_kv_heads, dtype=torch.int32),
    )
    reference = next(i for i in block_topk.implementations() if i.name == "reference")
    reference.run(
        mass.contiguous(),
        seq_lens.to(torch.int32),
        budget.block_size,
        mass.new_full((num_rows,), budget.budget_blocks, dtype=torch.int32),
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
