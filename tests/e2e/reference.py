"""Greedy answers by transformers, under a mask that is written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Mask = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def masked_reference(
    model_path: str, prompts: list[list[int]], answers: list[dict[str, Any]], sees: Mask
) -> list[tuple[list[int], list[float]]]:
    """Greedy token and its logprob at every generated position, by transformers.

    ``sees`` may answer for each query head, in front.

    The generated tokens are forced, so one forward pass per prompt checks all steps; the
    mask is written out and knows nothing of blocks, chunks or caches.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        model_path, dtype=torch.float32, attn_implementation="sdpa"
    )
    results = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt + answer["tokens"][:-1]])
        row = torch.arange(ids.shape[1])[:, None]
        column = torch.arange(ids.shape[1])[None, :]
        visible = (column <= row) & sees(row, column)
        mask = torch.where(visible, 0.0, torch.finfo(torch.float32).min)
        mask = mask.view(1, -1, *mask.shape[-2:])
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask).logits[0, len(prompt) - 1 :]
        best = logits.log_softmax(-1).max(-1)
        results.append((best.indices.tolist(), best.values.tolist()))
    return results
