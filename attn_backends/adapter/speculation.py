"""vLLM's speculative decoding, through which a method's sparse rows draft (docs/adr/0012).

vLLM is told of a draft model that is the served model, so that it keeps slots for what is drafted,
verifies and counts; ``proposer.py`` then stands in its drafter's place and loads nothing.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig

DRAFT_MODEL = "draft_model"


def speculative_arguments(model: str, num_tokens: int) -> dict[str, Any]:
    """What stands in ``--speculative-config``; sampled drafts, so that sampled answers accept them.

    Args:
        model: that is served.
        num_tokens: that a step drafts.
    """
    return {
        "method": DRAFT_MODEL,
        "model": model,
        "num_speculative_tokens": num_tokens,
        "draft_sample_method": "probabilistic",
    }


def speculation_reasons(vllm_config: VllmConfig, device_type: str, draft_tokens: int) -> list[str]:
    """Why drafts of ours cannot be verified, or vLLM's own speculative decoding not be served.

    Args:
        vllm_config: complete.
        device_type: ``cpu`` or ``cuda``.
        draft_tokens: of a step, as our settings have it; 0: none.
    """
    speculation: Any = vllm_config.speculative_config
    if not draft_tokens:
        if speculation is None:
            return []
        return ["speculative decoding (to draft with the method itself: --lossless-tokens)"]
    if speculation is None:
        arguments = json.dumps(speculative_arguments(vllm_config.model_config.model, draft_tokens))
        return [f"lossless_tokens without vLLM's --speculative-config '{arguments}'"]
    return [
        *_foreign_settings(vllm_config, speculation, draft_tokens),
        *_untried(vllm_config, device_type),
    ]


def _foreign_settings(vllm_config: VllmConfig, speculation: Any, draft_tokens: int) -> list[str]:
    """Settings of ``--speculative-config`` that are not what ``speculative_arguments`` says."""
    served: Any = vllm_config.model_config
    wanted = {
        **speculative_arguments(served.model, draft_tokens),
        "rejection_sample_method": "standard",
        "parallel_drafting": False,
        "disable_padded_drafter_batch": False,
        "use_heterogeneous_vocab": False,
        "num_speculative_tokens_per_batch_size": None,
    }
    found = {name: getattr(speculation, name) for name in wanted}
    reasons = [
        f"speculative_config.{name} {found[name]!r} beside lossless_tokens {draft_tokens} "
        f"(it must be {value!r})"
        for name, value in wanted.items()
        if found[name] != value
    ]
    drafting: Any = speculation.draft_model_config
    if drafting is not None and drafting.max_model_len != served.max_model_len:
        reasons.append(
            f"a draft model's length of {drafting.max_model_len} beside --max-model-len "
            f"{served.max_model_len} (they must be equal)"
        )
    return reasons


def _untried(vllm_config: VllmConfig, device_type: str) -> list[str]:
    """What drafts have not been tried with, or cannot be right with."""
    parallel: Any = vllm_config.parallel_config
    model: Any = vllm_config.model_config
    checks = [
        (
            model.supports_multimodal_inputs or model.uses_mrope or model.enable_prompt_embeds,
            "models and prompts of more than tokens with --lossless-tokens (drafts are of tokens)",
        ),
        (
            device_type != "cpu" and not vllm_config.use_v2_model_runner,
            "vLLM's V1 model runner on GPUs with --lossless-tokens "
            "(set VLLM_USE_V2_MODEL_RUNNER=1)",
        ),
        (vllm_config.lora_config is not None, "--enable-lora with --lossless-tokens"),
        (parallel.data_parallel_size > 1, "--data-parallel-size with --lossless-tokens (use 1)"),
        (
            bool(model.logits_processors),
            "--logits-processors with --lossless-tokens (vLLM does not verify through them)",
        ),
    ]
    return [reason for failed, reason in checks if failed]


def require_own_drafter(drafter: Any, model: Any) -> None:
    """Asked once the model is loaded: another drafter would hold a second copy of the weights.

    Args:
        drafter: that the runner would ask.
        model: that is served.

    Raises:
        RuntimeError: it drafts with something else.
    """
    if getattr(drafter, "model", None) is not model:
        raise RuntimeError(
            f"vLLM's runner drafts with {type(drafter).__name__}, not with the served model: "
            "lossless_tokens does not work with this release of vLLM"
        )
