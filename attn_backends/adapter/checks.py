"""Fail closed: every combination we cannot serve is named before the server starts.

Checked where vLLM's configuration is complete (the platform's
``check_and_update_config``), in the front-end process, so that the message is short.
What only a constructed layer knows is checked again in ``impl.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from attn_backends.adapter.speculation import speculation_reasons
from attn_backends.config import ConfigError
from attn_backends.method import SparseMethod

if TYPE_CHECKING:
    from vllm.config import VllmConfig

MIN_BLOCK_TOKENS = {"cpu": 32, "cuda": 16}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _alibi(hf_config: Any) -> bool:
    if getattr(hf_config, "alibi", False):
        return True
    if getattr(hf_config, "position_embedding_type", None) == "alibi":
        return True
    attn_config = getattr(hf_config, "attn_config", None)
    if isinstance(attn_config, dict) and attn_config.get("alibi"):
        return True
    names = getattr(hf_config, "architectures", None) or []
    if any(name.startswith(("Bloom", "Jais")) for name in names):
        return True
    is_baichuan_13b = getattr(hf_config, "hidden_size", 0) == 5120
    return is_baichuan_13b and any(name.startswith("Baichuan") for name in names)


def _has_sliding_layers(model_config: Any, layer_types: list[str]) -> bool:
    """Whether vLLM gives some layer a window: the types say which, where a model has types.

    Qwen2-style configurations keep a ``sliding_window`` that no layer has where
    ``max_window_layers`` is the number of layers.
    """
    if layer_types:
        return any("sliding" in kind for kind in layer_types)
    return model_config.get_sliding_window() is not None


def _model_reasons(model_config: Any) -> list[str]:
    text_config = model_config.hf_text_config
    layer_types = getattr(text_config, "layer_types", None) or []
    head_size = model_config.get_head_size()
    checks = [
        (model_config.use_mla, "MLA attention"),
        (model_config.is_encoder_decoder, "cross-attention (an encoder-decoder model)"),
        (model_config.runner_type != "generate", f"runner type {model_config.runner_type!r}"),
        (
            _has_sliding_layers(model_config, layer_types),
            "sliding-window layers of the model itself "
            f"(window {model_config.get_sliding_window()})",
        ),
        (
            any("chunked" in kind for kind in layer_types)
            or getattr(text_config, "attention_chunk_size", None) is not None,
            "chunked local attention layers",
        ),
        (model_config.is_hybrid, "hybrid models (Mamba or linear-attention layers)"),
        (model_config.is_attention_free, "attention-free models"),
        (_alibi(text_config), "ALiBi"),
        (
            bool(getattr(text_config, "attn_logit_softcapping", None)),
            "attention logit soft-capping",
        ),
        (
            any(name.startswith("GptOss") for name in model_config.architectures),
            "learned attention sinks",
        ),
        (model_config.is_mm_prefix_lm, "bidirectional multimodal prefixes"),
        (model_config.rswa_window is not None, "reference sliding-window attention"),
        (model_config.dtype not in _DTYPES, f"dtype {model_config.dtype}"),
        (
            head_size % 16 != 0 or head_size > 256,
            f"head size {head_size} (multiples of 16 up to 256 work)",
        ),
    ]
    return [reason for failed, reason in checks if failed]


def _engine_reasons(vllm_config: VllmConfig, device_type: str) -> list[str]:
    cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
    smallest = MIN_BLOCK_TOKENS[device_type]
    checks = [
        (
            cache.cache_dtype != "auto",
            f"--kv-cache-dtype {cache.cache_dtype} (use auto: the model's own dtype)",
        ),
        (
            cache.block_size % smallest != 0,
            f"--block-size {cache.block_size} (use a multiple of {smallest})",
        ),
        (cache.kv_sharing_fast_prefill, "--kv-sharing-fast-prefill"),
        (vllm_config.kv_transfer_config is not None, "KV transfer connectors"),
        (
            parallel.pipeline_parallel_size > 1,
            "--pipeline-parallel-size (selections do not cross stages; use tensor parallelism)",
        ),
        (parallel.decode_context_parallel_size > 1, "decode context parallelism"),
        (parallel.prefill_context_parallel_size > 1, "prefill context parallelism"),
        (parallel.use_ubatching, "micro-batches (--enable-dbo): they would share one selection"),
        (vllm_config.attention_config.use_non_causal, "non-causal attention"),
        (
            device_type == "cpu" and vllm_config.use_v2_model_runner,
            "vLLM's V2 model runner on CPUs (set VLLM_USE_V2_MODEL_RUNNER=0)",
        ),
    ]
    return [reason for failed, reason in checks if failed]


def unsupported_reasons(
    vllm_config: VllmConfig, device_type: str, draft_tokens: int = 0
) -> list[str]:
    """What of this configuration no method of ours can serve; empty when all is well.

    Args:
        vllm_config: complete, after the platform's own updates.
        device_type: ``cpu`` or ``cuda``.
        draft_tokens: see ``MethodConfig.draft_tokens``.
    """
    if vllm_config.model_config is None:
        return []
    return [
        *_model_reasons(vllm_config.model_config),
        *_engine_reasons(vllm_config, device_type),
        *speculation_reasons(vllm_config, device_type, draft_tokens),
    ]


def refuse(method: SparseMethod, reasons: list[str]) -> ConfigError:
    """The error for a configuration we cannot serve."""
    return ConfigError(
        f"{method.name} does not support {'; '.join(reasons)}. Drop --attention-backend "
        f"{method.name} to serve with stock vLLM, or set vllm_ext.strict to false "
        "(--no-strict) to serve dense, counted as such in /metrics"
    )
