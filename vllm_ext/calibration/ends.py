"""Ends of prompts, read again and again under other spans; the prompts before them once.

What a head's span is worth is tried, not estimated: a prompt is read under a plan and its keys and
values are kept, and only the few tokens behind it (a question and its answer, the last words of a
text) are read under a plan with one head changed. Layers below the changed one give what they gave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from kvcache.spans import Span
from vllm_ext.calibration.spanned import SpannedModel, visible

Layer = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class End:
    """Some tokens behind the first ones of a prompt.

    Attributes:
        cut: tokens of the prompt before it, no fewer than sinks.
        ids: its tokens; the last one is only compared.
        compared_tokens: at its end.
    """

    cut: int
    ids: list[int]
    compared_tokens: int


@dataclass
class Reading:
    """A prompt, and what comes after it.

    Attributes:
        kind: ``retrieval`` or ``text``.
        ids: of the prompt.
        ends: of it.
        kept: keys and values of each layer, ``[num_kv_heads, num_tokens, head_size]``.
    """

    kind: str
    ids: list[int]
    ends: list[End]
    kept: list[Layer] = field(default_factory=list)


class Ends:
    """The ends of prompts as one batch.

    Args:
        model: frozen.
        readings: whose ``kept`` is filled in.
    """

    def __init__(self, model: SpannedModel, readings: Sequence[Reading]) -> None:
        self._model = model
        self._ends = [(reading.kept, end) for reading in readings for end in reading.ends]
        fed = [end.ids[:-1] for _, end in self._ends]
        self._rows: list[slice] = []
        compared: list[int] = []
        first = 0
        for ids, (_, end) in zip(fed, self._ends, strict=True):
            self._rows.append(slice(first, first + len(ids)))
            first += len(ids)
            compared += range(first - end.compared_tokens, first)
        device = model.model.device
        self._tokens = torch.tensor([list(chain(*fed))], device=device)
        positions = [range(end.cut, end.cut + len(end.ids) - 1) for _, end in self._ends]
        self._positions = torch.tensor([list(chain(*positions))], device=device)
        self._compared = torch.tensor(compared, device=device)
        self._sizes = [end.compared_tokens for _, end in self._ends]
        self._visible: dict[tuple[int, Span], tuple[torch.Tensor, torch.Tensor]] = {}
        self._below: list[Any] = []  # what every layer gave under the plan of ``logprobs``

    def logprobs(self, spans: Sequence[Span]) -> list[torch.Tensor]:
        """``[compared_tokens, vocabulary]`` of every end; and what ``changed`` starts from.

        Args:
            spans: of each KV head, layer by layer.
        """
        self._below = []
        hooks = [
            layer.register_forward_hook(lambda module, args, out: self._below.append(out))
            for layer in self._model.layers
        ]
        try:
            return self._given(spans)
        finally:
            for hook in hooks:
                hook.remove()

    def changed(self, spans: Sequence[Span], first_layer: int) -> list[torch.Tensor]:
        """As ``logprobs``, where nothing differs below a layer from what that was given last."""
        with _replayed(self._model.layers[:first_layer], self._below[:first_layer]):
            return self._given(spans)

    @torch.no_grad()
    def _given(self, spans: Sequence[Span]) -> list[torch.Tensor]:
        with self._model.attending(self._attention(spans)):
            hidden = self._model.model.model(
                input_ids=self._tokens, position_ids=self._positions, use_cache=False
            ).last_hidden_state
        logits = self._model.model.lm_head(hidden[0, self._compared])
        return list(logits.float().log_softmax(-1).split(self._sizes))

    def _attention(self, spans: Sequence[Span]) -> Callable[..., Any]:
        num_kv_heads = self._model.num_kv_heads

        def attend(
            module: Any,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            attention_mask: torch.Tensor | None,
            scaling: float | None = None,
            **kwargs: Any,
        ) -> tuple[torch.Tensor, None]:
            """transformers' attention signature, all ends one behind the other."""
            out = torch.empty_like(query)
            group = query.shape[1] // num_kv_heads
            for number, rows in enumerate(self._rows):
                past = self._ends[number][0][module.layer_idx]
                for head in range(num_kv_heads):
                    mine = slice(head * group, (head + 1) * group)
                    own = key[:, head : head + 1, rows], value[:, head : head + 1, rows]
                    span = spans[module.layer_idx * num_kv_heads + head]
                    keys, values, mask = self._seen(number, span, head, past, own)
                    out[:, mine, rows] = scaled_dot_product_attention(
                        query[:, mine, rows],
                        keys.expand(-1, group, -1, -1),
                        values.expand(-1, group, -1, -1),
                        attn_mask=mask,
                        scale=scaling,
                    )
            return out.transpose(1, 2).contiguous(), None

        return attend

    def _seen(
        self, number: int, span: Span, head: int, past: Layer, own: Layer
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys and values ``[1, 1, tokens, head_size]`` of an end, and which of its rows see them,
        ``[rows, tokens]``.
        """
        end = self._ends[number][1]
        if (number, span) not in self._visible:
            queries = slice(end.cut, end.cut + len(end.ids) - 1)
            self._visible[number, span] = visible(span, queries, own[0].device)
        tokens, mask = self._visible[number, span]
        sinks, behind = span.sink_tokens, int(tokens[span.sink_tokens])
        keys, values = (
            torch.cat([kept[head, :sinks], kept[head, behind : end.cut], fresh[0, 0]])
            for kept, fresh in zip(past, own, strict=True)
        )
        return keys[None, None], values[None, None], mask


def read(model: SpannedModel, reading: Reading, spans: Sequence[Span]) -> list[torch.Tensor]:
    """Reads a prompt and its ends: ``[compared_tokens, vocabulary]`` log-probabilities of each.

    Args:
        model: frozen.
        reading: whose ``kept`` becomes these spans'.
        spans: of each KV head, layer by layer.
    """
    reading.kept = model.read(reading.ids, spans)
    return Ends(model, [reading]).logprobs(spans)


def divergences(wanted: Sequence[torch.Tensor], given: Sequence[torch.Tensor]) -> np.ndarray:
    """``[ends]``: mean KL divergence over each end's tokens."""
    pairs = zip(wanted, given, strict=True)
    return np.array([float((one.exp() * (one - two)).sum(-1).mean()) for one, two in pairs])


@contextmanager
def _replayed(layers: Sequence[Any], outputs: Sequence[Any]) -> Iterator[None]:
    """Layers that give what they gave, whatever they are given: a hook cannot spare their work."""
    for layer, output in zip(layers, outputs, strict=True):
        layer.forward = lambda *args, _output=output, **kwargs: _output
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
