"""A checkpoint in transformers whose prompts are dense and whose answers follow routes.

A layer routed full reads everything, one routed sparse the sinks and a window: of the answer's rows
alone, so that the prompt, and with it the answer's first token, is what the dense model makes of
it. The prompt's keys and values are kept and shared by all variants of its answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from kvcache.spans import Span
from vllm_ext.calibration.routed_attention import DenseReading, Prompted, RoutedAnswer

NAME = "vllm_ext_routes"
LOGITS_BYTES = {"cuda": 1 << 31, "cpu": 1 << 27}  # at once, of attention or the vocabulary


@dataclass(frozen=True)
class Evidence:
    """What a prompt's own pass says about its answer; ``gap`` is what a sparse layer cannot see.

    Attributes:
        gap_mean: ``[layers, num_query_heads]``, attention mass in the gap, mean of the last
            ``EVIDENCE_QUERIES`` queries.
        gap_max: the highest of these queries.
        gap_last: of the last query.
        pooled_query: ``[layers, 2 * head_size]``, queries before RoPE, mean over heads and the
            first, then the last ``POOLED_QUERIES`` tokens.
    """

    gap_mean: torch.Tensor
    gap_max: torch.Tensor
    gap_last: torch.Tensor
    pooled_query: torch.Tensor


class RoutedModel:
    """fp32.

    Args:
        model: of transformers, decoder-only; its attention is replaced.
        span: what sparse layers see; a plain window.
    """

    def __init__(self, model: Any, span: Span) -> None:
        from transformers import AttentionInterface

        self._attend: Callable[..., Any] = self._unset
        AttentionInterface.register(NAME, lambda *args, **kwargs: self._attend(*args, **kwargs))
        self.model = model.eval()
        self.model.set_attn_implementation(NAME)
        self.model.requires_grad_(False)
        self.device: torch.device = model.device
        config = model.config
        self.num_layers: int = config.num_hidden_layers
        self.num_kv_heads: int = (
            getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        )
        self.num_query_heads: int = config.num_attention_heads
        self.span = span

    @classmethod
    def load(cls, folder: Path, span: Span, device: str) -> Self:
        """A checkpoint's folder."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return cls(model.to(device), span)

    @torch.no_grad()
    def prefill(self, ids: Sequence[int]) -> tuple[Prompted, Evidence]:
        """One prompt, dense."""
        reading = DenseReading(self.span)
        tokens = torch.tensor([ids], device=self.device)
        with self._attending(reading.attend), reading.pooling(self.model):
            hidden = self.model.model(input_ids=tokens, use_cache=False).last_hidden_state
        first_ids = self.model.lm_head(hidden[:, -1]).argmax(-1)
        lengths_tokens = torch.tensor([len(ids)], device=self.device)
        prompted = Prompted(reading.keys, reading.values, lengths_tokens, first_ids)
        gap = torch.stack(reading.gaps).cpu()
        pooled = torch.stack(reading.pooled).cpu()
        return prompted, Evidence(gap.mean(-1), gap.amax(-1), gap[..., -1], pooled)

    @torch.no_grad()
    def respond(self, prompted: Prompted, routes: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """Greedy answers, whatever comes after their ends included.

        Args:
            prompted: the prompts.
            routes: bool ``[prompts, variants, layers]``, true is full.
            num_tokens: after the first one.

        Returns:
            ``[prompts, variants, 1 + num_tokens]``.
        """
        given = prompted.first_ids[:, None, None].expand(-1, routes.shape[1], 1)
        answer = RoutedAnswer(prompted, routes.to(self.device), self.span)
        parts = [given]
        for _ in range(num_tokens):
            given = self._logits(answer, given).argmax(-1)
            parts.append(given)
        return torch.cat(parts, -1)

    @torch.no_grad()
    def compare(
        self, prompted: Prompted, answers: torch.Tensor, routes: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """How far variants are from dense on the same answers.

        Args:
            prompted: the prompts.
            answers: ``[prompts, 1 + tokens]``.
            routes: bool ``[prompts, variants, layers]``, true is full.

        Returns:
            Of each token after the first, ``[prompts, variants, tokens]`` on the CPU: KL(dense ||
            variant) in nats, and whether both think the same token likeliest.
        """
        batch, num_rows = prompted.keys[0].shape[0], answers.shape[1] - 1
        seq_len = prompted.keys[0].shape[2] + num_rows
        row_bytes = (
            4 * batch * num_rows * max(self.num_query_heads * seq_len, self.model.config.vocab_size)
        )
        step = max(1, LOGITS_BYTES[self.device.type] // row_bytes - 1)
        routes = routes.to(self.device)
        parts = [
            self._compare(prompted, answers, routes[:, first : first + step])
            for first in range(0, routes.shape[1], step)
        ]
        kl, agrees = zip(*parts, strict=True)
        return torch.cat(kl, 1).cpu(), torch.cat(agrees, 1).cpu()

    def _compare(
        self, prompted: Prompted, answers: torch.Tensor, routes: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Dense goes along as the first variant.
        routes = torch.cat([torch.ones_like(routes[:, :1]), routes], 1)
        given = answers[:, None, :-1].expand(-1, routes.shape[1], -1)
        logits = self._logits(RoutedAnswer(prompted, routes, self.span), given)
        logprobs = torch.log_softmax(logits, -1)
        likeliest = logits.argmax(-1)
        del logits
        dense = logprobs[:, :1]
        kl = (dense.exp() * (dense - logprobs)).sum(-1)
        return kl[:, 1:], likeliest[:, 1:] == likeliest[:, :1]

    def _logits(self, answer: RoutedAnswer, ids: torch.Tensor) -> torch.Tensor:
        """``[prompts, variants, rows, vocabulary]`` of an answer's next rows, ``ids [prompts,
        variants, rows]``.
        """
        positions = answer.next_rows(ids.shape[2])
        with self._attending(answer.attend):
            hidden = self.model.model(
                input_ids=ids.flatten(0, 1),
                position_ids=positions[:, None].expand_as(ids).flatten(0, 1),
                use_cache=False,
            ).last_hidden_state
        logits: torch.Tensor = self.model.lm_head(hidden)
        return logits.reshape(*ids.shape, -1)

    @contextmanager
    def _attending(self, attend: Callable[..., Any]) -> Iterator[None]:
        self._attend = attend
        try:
            yield
        finally:
            self._attend = self._unset

    @staticmethod
    def _unset(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("outside of prefill, respond and compare this model attends to nothing")
