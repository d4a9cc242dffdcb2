"""Fail closed: each combination that no method serves is named."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attn_backends.adapter.checks import refuse, unsupported_reasons
from attn_backends.adapter.speculation import speculative_arguments
from attn_backends.answer_windows import answer_entries
from attn_backends.config import ConfigError, SettingError
from attn_backends.method import Geometry
from attn_backends.methods import load_method
from attn_backends.plan import LayerRole, LayerSchedule
from kvcache.entries import KVEntry
from kvcache.retention import KeepAll
from kvcache.spans import Span


def _vllm_config(
    text: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    cache: dict[str, Any] | None = None,
    engine: dict[str, Any] | None = None,
    parallel: dict[str, Any] | None = None,
) -> Any:
    model_config = {
        "hf_text_config": SimpleNamespace(**(text or {})),
        "architectures": ["LlamaForCausalLM"],
        "use_mla": False,
        "is_encoder_decoder": False,
        "runner_type": "generate",
        "is_hybrid": False,
        "is_attention_free": False,
        "is_mm_prefix_lm": False,
        "rswa_window": None,
        "dtype": torch.bfloat16,
        "get_sliding_window": lambda: None,
        "get_head_size": lambda: 64,
        "model": "models/one",
        "max_model_len": 4096,
        "logits_processors": None,
        "supports_multimodal_inputs": False,
        "uses_mrope": False,
        "enable_prompt_embeds": False,
    } | (model or {})
    return SimpleNamespace(
        model_config=SimpleNamespace(**model_config),
        cache_config=SimpleNamespace(
            **(
                {"cache_dtype": "auto", "block_size": 32, "kv_sharing_fast_prefill": False}
                | (cache or {})
            )
        ),
        parallel_config=SimpleNamespace(
            **(
                {
                    "pipeline_parallel_size": 1,
                    "decode_context_parallel_size": 1,
                    "prefill_context_parallel_size": 1,
                    "use_ubatching": False,
                    "data_parallel_size": 1,
                }
                | (parallel or {})
            )
        ),
        attention_config=SimpleNamespace(use_non_causal=False),
        **(
            {
                "speculative_config": None,
                "kv_transfer_config": None,
                "lora_config": None,
                "use_v2_model_runner": False,
            }
            | (engine or {})
        ),
    )


def test_an_ordinary_model_has_no_reasons() -> None:
    assert unsupported_reasons(_vllm_config(), "cpu") == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": {"use_mla": True}}, "MLA"),
        ({"engine": {"use_v2_model_runner": True}}, "V2 model runner"),
        ({"model": {"is_encoder_decoder": True}}, "cross-attention"),
        ({"model": {"runner_type": "pooling"}}, "pooling"),
        ({"model": {"get_sliding_window": lambda: 4096}}, "sliding-window layers of the model"),
        ({"text": {"layer_types": ["full_attention", "sliding_attention"]}}, "sliding-window"),
        ({"text": {"attention_chunk_size": 8192}}, "chunked local"),
        ({"text": {"alibi": True}}, "ALiBi"),
        ({"text": {"position_embedding_type": "alibi"}}, "ALiBi"),
        ({"text": {"architectures": ["BloomForCausalLM"]}}, "ALiBi"),
        ({"text": {"attn_logit_softcapping": 50.0}}, "soft-capping"),
        ({"model": {"architectures": ["GptOssForCausalLM"]}}, "learned attention sinks"),
        ({"model": {"is_hybrid": True}}, "hybrid"),
        ({"model": {"is_mm_prefix_lm": True}}, "multimodal"),
        ({"model": {"get_head_size": lambda: 72}}, "head size 72"),
        ({"model": {"dtype": torch.float64}}, "float64"),
        ({"cache": {"cache_dtype": "fp8"}}, "--kv-cache-dtype fp8"),
        ({"cache": {"block_size": 16}}, "--block-size 16 (use a multiple of 32)"),
        ({"cache": {"kv_sharing_fast_prefill": True}}, "--kv-sharing-fast-prefill"),
        ({"engine": {"speculative_config": object()}}, "speculative decoding (to draft with the"),
        ({"engine": {"kv_transfer_config": object()}}, "KV transfer"),
        ({"parallel": {"pipeline_parallel_size": 2}}, "--pipeline-parallel-size"),
        ({"parallel": {"decode_context_parallel_size": 2}}, "decode context parallelism"),
    ],
)
def test_each_unsupported_combination_is_named(change: dict[str, Any], words: str) -> None:
    reasons = unsupported_reasons(_vllm_config(**change), "cpu")
    assert len(reasons) == 1
    assert words in reasons[0]


def _speculation(**changes: Any) -> Any:
    """vLLM's ``SpeculativeConfig`` as ``vllm-ext serve --lossless-tokens 3`` writes it."""
    settings = {
        **speculative_arguments("models/one", 3),
        "rejection_sample_method": "standard",
        "parallel_drafting": False,
        "disable_padded_drafter_batch": False,
        "use_heterogeneous_vocab": False,
        "num_speculative_tokens_per_batch_size": None,
        "draft_model_config": SimpleNamespace(max_model_len=4096),
    }
    return SimpleNamespace(**settings | changes)


def test_our_own_speculative_settings_are_taken() -> None:
    engine = {"speculative_config": _speculation()}
    assert unsupported_reasons(_vllm_config(engine=engine), "cpu", draft_tokens=3) == []


@pytest.mark.parametrize("is_v2", [True, False])
def test_drafts_on_gpus_need_the_second_runner(is_v2: bool) -> None:
    engine = {"speculative_config": _speculation(), "use_v2_model_runner": is_v2}
    reasons = unsupported_reasons(_vllm_config(engine=engine), "cuda", draft_tokens=3)
    assert ["VLLM_USE_V2_MODEL_RUNNER=1" in reason for reason in reasons] == [True] * (not is_v2)


def test_drafts_need_vllm_s_speculative_decoding() -> None:
    (reason,) = unsupported_reasons(_vllm_config(), "cpu", draft_tokens=3)
    arguments = json.dumps(speculative_arguments("models/one", 3))
    assert reason == f"lossless_tokens without vLLM's --speculative-config '{arguments}'"


@pytest.mark.parametrize(
    ("speculation", "change", "words"),
    [
        ({"method": "ngram"}, {}, "speculative_config.method 'ngram' beside lossless_tokens 3"),
        ({"model": "models/two"}, {}, "speculative_config.model 'models/two'"),
        ({"num_speculative_tokens": 5}, {}, "num_speculative_tokens 5 beside lossless_tokens 3"),
        ({"draft_sample_method": "greedy"}, {}, "(it must be 'probabilistic')"),
        ({"rejection_sample_method": "synthetic"}, {}, "(it must be 'standard')"),
        ({"parallel_drafting": True}, {}, "parallel_drafting True"),
        ({"disable_padded_drafter_batch": True}, {}, "disable_padded_drafter_batch True"),
        ({"use_heterogeneous_vocab": True}, {}, "use_heterogeneous_vocab True"),
        ({"num_speculative_tokens_per_batch_size": [1]}, {}, "per_batch_size [1]"),
        ({"draft_model_config": SimpleNamespace(max_model_len=9)}, {}, "length of 9 beside"),
        ({}, {"engine": {"lora_config": object()}}, "--enable-lora with --lossless-tokens"),
        ({}, {"parallel": {"data_parallel_size": 2}}, "--data-parallel-size with"),
        ({}, {"model": {"logits_processors": ["mine"]}}, "--logits-processors with"),
        ({}, {"model": {"enable_prompt_embeds": True}}, "of more than tokens with"),
    ],
)
def test_what_drafts_cannot_be_verified_with_is_named(
    speculation: dict[str, Any], change: dict[str, Any], words: str
) -> None:
    engine = {"speculative_config": _speculation(**speculation)} | change.get("engine", {})
    config = _vllm_config(**change | {"engine": engine})
    (reason,) = unsupported_reasons(config, "cpu", draft_tokens=3)
    assert words in reason


@pytest.mark.parametrize(
    ("settings", "is_refused"),
    [
        ({"use_sliding_window": True, "max_window_layers": 4}, False),  # the last: no layer slides
        ({"use_sliding_window": True, "max_window_layers": 2}, True),
        ({"use_sliding_window": True, "max_window_layers": 0}, True),
        ({"use_sliding_window": False, "max_window_layers": 2}, False),
        ({"use_sliding_window": True, "layer_types": ["full_attention"] * 4}, False),
    ],
)
def test_the_layer_types_say_whether_a_model_has_sliding_layers(
    settings: dict[str, Any], is_refused: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config(num_hidden_layers=4, sliding_window=128, **settings)
    model = {"hf_text_config": config, "get_sliding_window": lambda: config.sliding_window}
    reasons = unsupported_reasons(_vllm_config(model=model), "cpu")
    wanted = ["sliding-window layers of the model itself (window 128)"]
    assert reasons == (wanted if is_refused else [])


def test_gpu_takes_blocks_of_16() -> None:
    assert unsupported_reasons(_vllm_config(cache={"block_size": 16}), "cuda") == []


def test_the_refusal_says_what_to_do() -> None:
    message = str(refuse(load_method("SINK_WINDOW"), ["ALiBi"]))
    assert "SINK_WINDOW does not support ALiBi" in message
    assert "--no-strict" in message


def test_a_worker_refuses_settings_that_the_block_of_the_loaded_model_rules_out() -> None:
    pytest.importorskip("vllm")
    from attn_backends.adapter.worker import retained_specs

    engine: Any = SimpleNamespace(
        additional_config={"vllm_ext": {"window_tokens": 64}},
        attention_config=SimpleNamespace(backend=SimpleNamespace(name="SINK_WINDOW")),
        cache_config=SimpleNamespace(block_size=128),
        parallel_config=SimpleNamespace(world_size=1),
    )
    with pytest.raises(SettingError, match="window_tokens is 64, less than one KV block of 128"):
        retained_specs(engine, {})


@pytest.mark.parametrize(
    ("device_type", "eager", "ranks", "words"),
    [
        ("cpu", False, 1, None),
        ("cuda", True, 1, None),
        ("cuda", False, 1, None),
        ("cpu", False, 2, "--tensor-parallel-size 2; use 1"),
    ],
)
def test_heads_with_caches_of_their_own_are_refused_where_they_were_not_tried(
    device_type: str,
    eager: bool,
    ranks: int,
    words: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Where they were tried in tests alone, they are served with a warning."""
    pytest.importorskip("vllm")
    from vllm_ext.platforms import selection

    entries = tuple(KVEntry(0, (head,), KeepAll()) for head in range(2))
    planned = entries, LayerSchedule.uniform(LayerRole.DENSE, 1), Geometry(1, 2, 2, 64, 32, 8, 512)
    monkeypatch.setattr(selection, "planned_entries", lambda *_: planned)
    engine: Any = SimpleNamespace(
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks),
        model_config=SimpleNamespace(enforce_eager=eager),
    )
    method = load_method("SINK_WINDOW")
    if words is None:
        selection._check_entries(method, engine, device_type)
        is_warned = "not been run on a GPU under CUDA graphs" in caplog.text
        assert is_warned is (device_type == "cuda" and not eager)
        return
    with pytest.raises(ConfigError, match=words):
        selection._check_entries(method, engine, device_type)


def test_layers_that_read_prompts_whole_are_refused_with_tensor_parallelism(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("vllm")
    from vllm_ext.platforms import selection

    spans = {0: (Span(64, 512),) * 2}
    schedule = LayerSchedule((LayerRole.WINDOW,), spans=spans, prompts_see_everything=True)
    entries = answer_entries(schedule, frees=True)
    planned = entries, schedule, Geometry(1, 2, 2, 64, 32, 8, 512)
    monkeypatch.setattr(selection, "planned_entries", lambda *_: planned)
    engine: Any = SimpleNamespace(
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
    )
    selection._check_entries(load_method("FLUX"), engine, "cpu")
    engine.parallel_config.tensor_parallel_size = 2
    with pytest.raises(ConfigError, match="FLUX has not been tested with --tensor-parallel-size 2"):
        selection._check_entries(load_method("FLUX"), engine, "cpu")
