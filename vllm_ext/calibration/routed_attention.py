"""Attention of ``RoutedModel``: of a dense prompt, and of its routed answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from kvcache.spans import Span

EVIDENCE_QUERIES = 32  # last of the prompt
POOLED_QUERIES = 100  # first and last of the prompt, as FluxAttention pools them


@dataclass(frozen=True)
class Prompted:
    """Prompts computed dense.

    Attributes:
        keys: of each layer ``[prompts, num_kv_heads, tokens, head_size]``; what lies beyond a
            prompt's length is never read.
        values: likewise.
        lengths_tokens: ``[prompts]``.
        first_ids: ``[prompts]``, the answers' first tokens.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    lengths_tokens: torch.Tensor
    first_ids: torch.Tensor

    @classmethod
    def stacked(cls, prompts: Sequence[Prompted]) -> Prompted:
        """All of them as one, padded to the longest."""
        if len(prompts) == 1:
            return prompts[0]
        longest = max(one.keys[0].shape[2] for one in prompts)

        def padded(parts: Sequence[torch.Tensor]) -> torch.Tensor:
            return torch.cat([pad(part, (0, 0, 0, longest - part.shape[2])) for part in parts])

        return cls(
            [padded(layer) for layer in zip(*(one.keys for one in prompts), strict=True)],
            [padded(layer) for layer in zip(*(one.values for one in prompts), strict=True)],
            torch.cat([one.lengths_tokens for one in prompts]),
            torch.cat([one.first_ids for one in prompts]),
        )

    def chosen(self, places: torch.Tensor) -> Prompted:
        """Some of them."""
        return Prompted(
            [layer[places] for layer in self.keys],
            [layer[places] for layer in self.values],
            self.lengths_tokens[places],
            self.first_ids[places],
        )


class DenseReading:
    """Attention of one dense prompt, in transformers' signature; keeps what it sees."""

    def __init__(self, span: Span) -> None:
        self._span = span
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.gaps: list[torch.Tensor] = []
        self.pooled: list[torch.Tensor] = []

    def attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        self.keys.append(key.contiguous())
        self.values.append(value.contiguous())
        self.gaps.append(gap_mass(query[0, :, -EVIDENCE_QUERIES:], key[0], scaling, self._span))
        # Repeated, since CUDA's kernels for fp32 know no groups.
        group = query.shape[1] // key.shape[1]
        keys, values = (tensor.repeat_interleave(group, 1) for tensor in (key, value))
        out = scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scaling)
        return out.transpose(1, 2).contiguous(), None

    @contextmanager
    def pooling(self, model: Any) -> Iterator[None]:
        """Pools queries as they leave their projections."""

        def pool(module: Any, args: Any, out: torch.Tensor) -> None:
            heads = out[0].reshape(len(out[0]), model.config.num_attention_heads, -1).mean(1)
            self.pooled.append(
                torch.cat([heads[:POOLED_QUERIES].mean(0), heads[-POOLED_QUERIES:].mean(0)])
            )

        handles = [
            layer.self_attn.q_proj.register_forward_hook(pool) for layer in model.model.layers
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class RoutedAnswer:
    """Attention of answers' rows, all variants of a prompt over the same prompt."""

    def __init__(self, prompted: Prompted, routes: torch.Tensor, span: Span) -> None:
        self._prompted, self._routes, self._span = prompted, routes, span
        num_layers = len(prompted.keys)
        self._keys: list[torch.Tensor | None] = [None] * num_layers
        self._values: list[torch.Tensor | None] = [None] * num_layers
        self._seen_tokens = 0
        self._full = self._sparse = torch.empty(0)

    def next_rows(self, num_rows: int) -> torch.Tensor:
        """Positions ``[prompts, num_rows]`` of the rows that come next."""
        lengths = self._prompted.lengths_tokens[:, None]
        device, longest = lengths.device, self._prompted.keys[0].shape[2]
        positions = lengths + self._seen_tokens + torch.arange(num_rows, device=device)
        self._seen_tokens += num_rows
        prompt = torch.arange(longest, device=device).expand(len(lengths), -1)
        prompt = prompt.masked_fill(prompt >= lengths, 1 << 40)  # padding is in the future
        tail = lengths + torch.arange(self._seen_tokens, device=device)
        tokens, now = torch.cat([prompt, tail], 1)[:, None], positions[..., None]
        near = tokens > now - self._span.tokens(0)
        self._full = tokens <= now  # [prompts, rows, tokens]
        self._sparse = self._full & (near | (tokens < self._span.sink_tokens))
        return positions

    def attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        layer: int = module.layer_idx
        is_full = self._routes[..., layer]
        num_kv_heads, shape = key.shape[1], query.shape
        keys = self._keys[layer] = _appended(self._keys[layer], key)
        values = self._values[layer] = _appended(self._values[layer], value)
        # [prompts, num_kv_heads, variants, group, rows, head_size]
        asked = query.reshape(*is_full.shape, num_kv_heads, -1, *shape[2:]).transpose(1, 2)
        tail_keys, tail_values = (
            tensor.reshape(*is_full.shape, *tensor.shape[1:]).transpose(1, 2)[:, :, :, None]
            for tensor in (keys, values)
        )
        far = asked.flatten(2, 4) @ self._prompted.keys[layer].mT
        near = asked @ tail_keys.mT
        logits = torch.cat([far.view(*near.shape[:-1], -1), near], -1).mul_(scaling)
        visible = torch.where(is_full[..., None, None], self._full[:, None], self._sparse[:, None])
        weights = logits.masked_fill_(~visible[:, None, :, None], -torch.inf).softmax(-1)
        prompt_tokens = far.shape[-1]
        out = weights[..., prompt_tokens:] @ tail_values
        weights = weights[..., :prompt_tokens].flatten(2, 4)
        out += (weights @ self._prompted.values[layer]).view_as(out)
        return out.transpose(1, 2).reshape(shape).transpose(1, 2).contiguous(), None


def gap_mass(query: torch.Tensor, key: torch.Tensor, scale: float, span: Span) -> torch.Tensor:
    """``[num_query_heads, queries]``: attention mass on what the span hides.

    Args:
        query: ``[num_query_heads, queries, head_size]``, of the last tokens.
        key: ``[num_kv_heads, seq_len, head_size]``.
        scale: factor on the logits.
        span: a plain window.
    """
    grouped = query.reshape(key.shape[0], -1, *query.shape[1:])
    tokens = torch.arange(key.shape[1], device=key.device)
    positions = tokens[-query.shape[1] :, None]
    logits = (grouped @ key[:, None].mT).mul_(scale)
    weights = logits.masked_fill_(tokens > positions, -torch.inf).softmax(-1)
    is_hidden = (tokens >= span.sink_tokens) & (tokens <= positions - span.tokens(0))
    mass: torch.Tensor = (weights * is_hidden).sum(-1).flatten(0, 1)
    return mass


def _appended(before: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
    return new if before is None else torch.cat([before, new], 2)
