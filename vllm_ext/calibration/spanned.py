"""A checkpoint in transformers whose KV heads see spans, in prefill and response alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from kvcache.spans import Span
from vllm_ext.errors import UserError

NAME = "vllm_ext_spans"
CHUNK_TOKENS = 512  # queries that are masked at once


class SpannedModel:
    """Batch 1, fp32, on the GPU where there is one.

    Attributes:
        model: of transformers, its weights without gradients.
        tokenizer: its own.
        layers: of the model, each with a ``self_attn``.

    Raises:
        UserError: a model of an unknown style.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

        self._attend: Callable[..., Any] = self._dense
        AttentionInterface.register(NAME, lambda *args, **kwargs: self._attend(*args, **kwargs))
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=NAME
        ).eval()
        self.model.requires_grad_(False).to("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        layers = getattr(getattr(self.model, "model", None), "layers", None)
        if layers is None or not all(hasattr(layer, "self_attn") for layer in layers):
            raise UserError(
                f"{folder}: only decoder-only models with model.layers, each with a self_attn, "
                "are known"
            )
        config = self.model.config
        self.layers: Sequence[Any] = layers
        self.num_layers = len(layers)
        self.num_kv_heads: int = (
            getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        )
        self.max_tokens: int = config.max_position_embeddings
        self._spans: Sequence[Span] = ()

    @contextmanager
    def attending(self, attend: Callable[..., Any]) -> Iterator[None]:
        """Another attention function for a while."""
        self._attend = attend
        try:
            yield
        finally:
            self._attend = self._dense

    @torch.no_grad()
    def respond(self, ids: list[int], num_tokens: int) -> tuple[list[int], torch.Tensor]:
        """What the dense model says, greedily and until it ends.

        Returns:
            The tokens, and ``[tokens, vocabulary]`` log-probabilities.
        """
        prompt = torch.tensor([ids], device=self.model.device)
        given = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=self.tokenizer.eos_token_id,
            return_dict_in_generate=True,
            output_logits=True,
        )
        response: list[int] = given.sequences[0, len(ids) :].tolist()
        return response, torch.cat(given.logits).float().log_softmax(-1)

    @torch.no_grad()
    def logprobs(self, ids: list[int], response_tokens: int, spans: Sequence[Span]) -> torch.Tensor:
        """``[response_tokens, vocabulary]``, of the last tokens given those before them.

        Args:
            ids: prompt and response.
            response_tokens: at their end.
            spans: of each KV head, layer by layer.
        """
        self._spans = spans
        with self.attending(self._spanned):
            return self.last_logprobs(ids, response_tokens)

    @torch.no_grad()
    def read(
        self, ids: list[int], spans: Sequence[Span]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of every layer, ``[num_kv_heads, num_tokens, head_size]`` each.

        Args:
            ids: of a prompt.
            spans: of each KV head, layer by layer.
        """
        kept = []

        def attend(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            kept.append((key[0], value[0]))
            return self._spanned(module, query, key, value, *args, **kwargs)

        self._spans = spans
        with self.attending(attend):
            tokens = torch.tensor([ids], device=self.model.device)
            self.model.model(input_ids=tokens, use_cache=False)
        return kept

    def last_logprobs(self, ids: list[int], num_tokens: int) -> torch.Tensor:
        """``[num_tokens, vocabulary]``, of the last tokens given those before them; with gradients
        where they are on.
        """
        tokens = torch.tensor([ids[:-1]], device=self.model.device)
        hidden = self.model.model(input_ids=tokens, use_cache=False).last_hidden_state
        logprobs: torch.Tensor = self.model.lm_head(hidden[0, -num_tokens:]).float().log_softmax(-1)
        return logprobs

    @staticmethod
    def _dense(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        out = scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=query.shape[2] == key.shape[2],
            scale=scaling,
            enable_gqa=True,
        )
        return out.transpose(1, 2).contiguous(), None

    def _spanned(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        out = torch.empty_like(query)
        group = query.shape[1] // self.num_kv_heads
        first_span = module.layer_idx * self.num_kv_heads
        for head, span in enumerate(self._spans[first_span : first_span + self.num_kv_heads]):
            heads = slice(head * group, (head + 1) * group)
            mine = slice(head, head + 1)
            out[:, heads] = attend_span(
                query[:, heads], key[:, mine], value[:, mine], span, scaling
            )
        return out.transpose(1, 2).contiguous(), None


def attend_span(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    span: Span,
    scaling: float | None,
) -> torch.Tensor:
    """Causal attention of heads that see the same span.

    Args:
        query: ``[1, num_query_heads, num_tokens, head_size]``.
        key: ``[1, num_kv_heads, num_tokens, head_size]``; value likewise.
        span: what every query sees.
        scaling: of the logits; None is torch's.

    Returns:
        As ``query``.
    """
    num_tokens = query.shape[2]
    if span.sees_everything(num_tokens):  # without a mask, which is slow
        return scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
    parts = []
    for first in range(0, num_tokens, CHUNK_TOKENS):
        queries = slice(first, min(first + CHUNK_TOKENS, num_tokens))
        tokens, mask = visible(span, queries, key.device)
        seen = (key[:, :, tokens], value[:, :, tokens])
        parts.append(
            scaled_dot_product_attention(
                query[:, :, queries], *seen, attn_mask=mask, scale=scaling, enable_gqa=True
            )
        )
    return torch.cat(parts, 2)


def visible(span: Span, queries: slice, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens that some of these queries see, ``[tokens]``, and which do, ``[queries, tokens]``."""
    sinks = min(span.sink_tokens, queries.stop)
    behind = max(sinks, span.first_seen(queries.start + 1))
    tokens = torch.cat([torch.arange(sinks), torch.arange(behind, queries.stop)])
    positions = torch.arange(queries.start, queries.stop)
    first_seen = torch.tensor([span.first_seen(p + 1) for p in positions.tolist()])
    is_near = tokens >= first_seen[:, None]
    mask = (tokens <= positions[:, None]) & (is_near | (tokens < span.sink_tokens))
    return tokens.to(device), mask.to(device)
