"""What it would cost to hide a part of the past from one KV head: MoA's influence, by rule.

MoA (arXiv 2406.14909, section 4.1) weighs each attention weight by the gradient of the loss on
responses that the dense model gave itself: hiding token ``j`` from query ``i`` changes the loss, to
first order, by ``A_ij / (1 - A_ij) * (sum_n g_in A_in - g_ij)`` with ``g = dL/dA``. We differ: a
rule hides a whole stretch of tokens from a query, so that its effect is taken of the stretch at
once, with the weights that remain made to add up to one: ``sum_j A_ij (D_i - g_ij) / (1 - sum_j
A_ij)``, ``D_i = sum_n g_in A_in``. Sums over a stretch are differences of running sums, whatever
the number of rules. Rules are our spans by position, sinks apart.

Effects are added up with their signs, queries and a group's query heads alike: that is the change
of the sample's loss, to first order. Added up by magnitude, the thousands of queries that change it
a little one way or the other drown the few that retrieve (docs/measurements.md has both).

The gradient of the logits, which the backward pass computes anyway, is the numerator with its sign
turned; so one backward pass measures all layers, heads and rules. Weights are computed again there,
some queries at a time, and never kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from kvcache.spans import Span

CHUNK_TOKENS = 512  # queries whose weights are held at once
LEAST_LEFT = 0.02  # of a query's weight: linear estimates beyond mean nothing


class Influence:
    """An attention function for transformers that measures in the backward pass.

    Args:
        spans: the rules.
        num_layers: of the model.
        num_kv_heads: of each layer.

    Attributes:
        change: ``[num_layers, num_kv_heads, rules]`` fp64, of the last sample: how much the loss
            grows, or falls, over all queries and the query heads of a group.
    """

    def __init__(self, spans: Sequence[Span], num_layers: int, num_kv_heads: int) -> None:
        self.spans = tuple(spans)
        self.change = torch.zeros(num_layers, num_kv_heads, len(spans), dtype=torch.float64)
        self._hidden: dict[tuple[int, int], _Hidden] = {}  # the same in every head and layer

    def hidden(self, first: int, last: int, device: torch.device) -> _Hidden:
        """What the rules hide from the queries at positions ``first`` to ``last - 1``."""
        if (first, last) not in self._hidden:
            self._hidden[first, last] = _Hidden.of(self.spans, first, last, device)
        return self._hidden[first, last]

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
        """transformers' attention signature; batch 1, query ``[1, num_query_heads, query_len,
        head_size]``, key and value ``[1, num_kv_heads, seq_len, head_size]``.
        """
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        if query.shape[2] != key.shape[2]:  # a step of a dense answer
            out = scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=True)
        else:
            layer = module.layer_idx
            apply: Any = _Measured.apply
            out = apply(query[0], key[0], value[0], scale, self, layer)[None]
        return out.transpose(1, 2).contiguous(), None

    def measure(self, model: Any, ids: Sequence[int], response_tokens: int) -> float:
        """Measures one sample.

        Args:
            model: whose attention this is, its weights without gradients.
            ids: prompt and response.
            response_tokens: at the end of them, which the dense model gave.

        Returns:
            The loss on the response, for people.
        """
        self.change.zero_()
        tokens = torch.tensor(ids, device=model.device)
        # Not of the weights, whose gradients nobody needs.
        inputs = model.get_input_embeddings()(tokens[None, :-1]).detach().requires_grad_()
        hidden = model.model(inputs_embeds=inputs, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[0, -response_tokens:])
        loss = cross_entropy(logits.float(), tokens[-response_tokens:])
        torch.autograd.backward(loss)
        return float(loss.detach())


class _Measured(torch.autograd.Function):
    """Causal attention of one layer; see ``Influence``."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        influence: Influence,
        layer: int,
    ) -> torch.Tensor:
        out = scaled_dot_product_attention(
            query[None], key[None], value[None], is_causal=True, scale=scale, enable_gqa=True
        )[0]
        ctx.save_for_backward(query, key, value, out)
        ctx.scale, ctx.influence, ctx.layer = scale, influence, layer
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        query, key, value, out = ctx.saved_tensors
        num_kv_heads, num_tokens = key.shape[:2]
        (grad_out,) = grads
        grouped = query.reshape(num_kv_heads, -1, *query.shape[1:])
        grad_out, out = grad_out.reshape(grouped.shape), out.reshape(grouped.shape)
        weighted = (grad_out * out).sum(-1, keepdim=True)  # D, of every query
        grad_query = torch.empty_like(grouped)
        grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
        change = ctx.influence.change[ctx.layer]
        for head in range(num_kv_heads):
            for first in range(0, num_tokens, CHUNK_TOKENS):
                last = min(first + CHUNK_TOKENS, num_tokens)
                asked, given = grouped[head, :, first:last], grad_out[head, :, first:last]
                keys, values = key[head, :last], value[head, :last]
                positions = torch.arange(first, last, device=key.device)
                logits = asked @ keys.T * ctx.scale
                future = torch.arange(last, device=key.device) > positions[:, None]
                weights = logits.masked_fill_(future, -torch.inf).softmax(-1)
                grad = given @ values.T
                grad_value[head, :last] += (weights.transpose(1, 2) @ given).sum(0)
                grad = grad.sub_(weighted[head, :, first:last]).mul_(weights)  # of the logits
                grad_query[head, :, first:last] = grad @ keys * ctx.scale
                grad_key[head, :last] += (grad.transpose(1, 2) @ asked).sum(0) * ctx.scale
                hidden = ctx.influence.hidden(first, last, key.device)
                change[head] += _of_rules(hidden, weights, grad).cpu()
        return grad_query.reshape(query.shape), grad_key, grad_value, None, None, None


@dataclass(frozen=True)
class _Hidden:
    """Which tokens every rule hides from some queries: those from ``starts`` up to ``ends``.

    Attributes:
        starts: ``[queries, rules]`` int64, the first one.
        ends: likewise, the one behind the last; where it is not above ``starts``, none.
    """

    starts: torch.Tensor
    ends: torch.Tensor

    @classmethod
    def of(cls, spans: Sequence[Span], first: int, last: int, device: torch.device) -> _Hidden:
        """From the queries at positions ``first`` to ``last - 1``."""
        seen = [[span.first_seen(p + 1) for span in spans] for p in range(first, last)]
        ends = torch.tensor(seen, device=device)
        starts = torch.tensor([span.sink_tokens for span in spans], device=device)
        return cls(starts.expand_as(ends), ends)

    def sums(self, running: torch.Tensor) -> torch.Tensor:
        """``[group, queries, rules]`` from running sums ``[group, queries, keys]``."""
        parts = []
        for bound in (self.ends, self.starts):
            index = (bound - 1).clamp(0, running.shape[-1] - 1).expand(len(running), -1, -1)
            parts.append(running.gather(-1, index) * (bound > 0))
        return (parts[0] - parts[1]).masked_fill_(self.ends <= self.starts, 0)


def _of_rules(hidden: _Hidden, weights: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """``[rules]`` fp64: how much each rule changes the loss through these queries of one KV head.

    Args:
        hidden: what the rules hide.
        weights: ``[group, queries, keys]``; overwritten.
        grad: of the logits, likewise; overwritten.
    """
    left = (1 - hidden.sums(weights.cumsum_(-1))).clamp_min_(LEAST_LEFT)
    return -(hidden.sums(grad.cumsum_(-1)) / left).sum((0, 1), dtype=torch.float64)
