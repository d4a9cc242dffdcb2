"""LoRA on vLLM's CPU platform without two faults of stock vLLM (see ``compat.py``).

Apart from ``compat.py`` since only servers with adapters import it.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.lora.ops.torch_ops import bgmv_expand, bgmv_shrink
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU


class ExtPunicaWrapperCPU(PunicaWrapperCPU):
    """Adapters change their own rows only. Named by ``Platform.get_punica_wrapper``.

    What: a row without an adapter has index -1. Triton's kernels skip it; the torch ops of the
        CPU (``vllm/lora/ops/torch_ops``) index with it and take the *last* adapter slot.
    Why: beside a request for an adapter, a request for the base model gets that adapter's answer,
        and its blocks stay in the base model's prefix cache.
    Upstream: vllm-project/vllm#48421 and #49656, open at v0.32.0.
    Remove when: tests/adapter/test_compat_lora.py says so.
    """

    def add_shrink(
        self, y: Any, x: torch.Tensor, lora_a_stacked: Any, scale: float, **kwargs: Any
    ) -> None:
        """See the base class; what other rows are given is zero."""
        super().add_shrink(y, x, lora_a_stacked, scale, **kwargs)
        if not self.no_lora:
            for buffer in y:
                buffer.view(-1, buffer.shape[-1])[self.token_lora_indices < 0] = 0

    def add_lora_embedding(
        self, y: torch.Tensor, x: torch.Tensor, lora_b_stacked: torch.Tensor, **kwargs: Any
    ) -> None:
        """See the base class; ``x`` are the tokens' rows of the adapters' first factors."""
        if not self.no_lora:
            x = x.masked_fill((self.token_lora_indices < 0).unsqueeze(-1), 0)
        super().add_lora_embedding(y, x, lora_b_stacked, **kwargs)

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        **kwargs: Any,
    ) -> None:
        """See the base class; ``x`` has one row per request, or rows of one request only."""
        if not lora_a_stacked.any():
            return  # no adapter has an output layer: whose rows these are does not matter
        indices = self.sampler_indices
        x, y = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        buffer = torch.zeros((x.size(0), lora_b_stacked.size(-1)), dtype=torch.float32)
        bgmv_shrink(x, lora_a_stacked, buffer, indices, scale)
        buffer *= (indices >= 0).unsqueeze(-1)
        bgmv_expand(buffer, lora_b_stacked, y, indices, add_inputs=True)


class PromptLogprobsPerAdapter:
    """Put before a V1 model runner of vLLM in the bases.

    What: logits of prompt tokens (``prompt_logprobs``, ``echo``) are asked for the tokens of one
        request, while the adapters are mapped to one row per request of the batch.
    Why: where an adapter has an output layer, two requests in a batch end the engine
        (``einsum(): subscript b has size 2 ...``), or their prompts are scored by each other's.
    Upstream: vllm-project/vllm#16668 and #51594, open at v0.32.0.
    Remove when: tests/adapter/test_compat_lora.py says so.
    """

    def _get_prompt_logprobs_dict(
        self, hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]
    ) -> dict[str, Any]:
        """One request at a time, with its own adapter mapped."""
        stock: Any = super()
        runner: Any = self
        wanted, batch = runner.num_prompt_logprobs, runner.input_batch
        found: dict[str, Any] = {}
        for request_id in [name for name in wanted if name in num_scheduled_tokens]:
            lora_id = int(batch.request_lora_mapping[batch.req_id_to_index[request_id]])
            adapters = set(batch.lora_id_to_lora_request.values())
            runner._set_active_loras((lora_id,), (lora_id,), adapters)
            runner.num_prompt_logprobs = {request_id: wanted[request_id]}
            found |= stock._get_prompt_logprobs_dict(hidden_states, num_scheduled_tokens)
            if not runner.num_prompt_logprobs:  # the prompt has been read
                del wanted[request_id]
        runner.num_prompt_logprobs = wanted
        return found


def with_adapters(runner: Any) -> None:
    """Makes a runner compute prompt log-probabilities as ``PromptLogprobsPerAdapter`` does.

    The worker constructs its runner itself and offers no other place (see ``audit.with_audit``).
    """
    stock: Any = type(runner)
    runner.__class__ = type(f"Lora{stock.__name__}", (PromptLogprobsPerAdapter, stock), {})
