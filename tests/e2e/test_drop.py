"""Dropped layers: the engine equals transformers with those layers' attention zeroed, and the
same memory holds more tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from attn_backends.checkpoint import fingerprint
from tests.e2e.engine import run_engine

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

NUM_LAYERS, DROPPED = 6, [0, 3]
NEW_TOKENS = 16
PROMPT_LENGTHS = (5, 64, 200, 333)
PROFILE: dict[str, Any] = {
    "schema_version": 1,
    "model": "tiny",
    "num_layers": NUM_LAYERS,
    "num_kv_heads": 2,
    "dense_layers": [1],
    "anchor_layers": [2],
    "head_maps": {},
    "drop_layers": DROPPED,
    "calibration": {},
}
# Budget and window hold the longest context: what differs from dense is the dropped layers.
SETTINGS: dict[str, dict[str, Any]] = {
    "TIDAL_DECODE": {"budget_tokens": 512, "min_context_tokens": 0},
    "SINK_WINDOW": {"sink_tokens": 32, "window_tokens": 512},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Llama whose attention matters: weights ten times wider than usual."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=512,
        max_position_embeddings=1024,
        initializer_range=0.2,
    )
    folder = tmp_path_factory.mktemp("tiny-llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def _prompts() -> list[list[int]]:
    source = torch.Generator().manual_seed(5)
    return [torch.randint(3, 512, (n,), generator=source).tolist() for n in PROMPT_LENGTHS]


def _greedy_without_layers(model_path: str, dropped: list[int]) -> list[list[int]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    for index in dropped:
        model.model.layers[index].self_attn.register_forward_hook(
            lambda module, args, output: (torch.zeros_like(output[0]), *output[1:])
        )
    answers = []
    for prompt in _prompts():
        ids = torch.tensor([prompt])
        with torch.no_grad():
            for _ in range(NEW_TOKENS):
                best = model(input_ids=ids, use_cache=False).logits[0, -1].argmax()
                ids = torch.cat([ids, best.view(1, 1)], dim=1)
        answers.append(ids[0, len(prompt) :].tolist())
    return answers


def _run(folder: str, method: str, profile: Path, dropped: list[int]) -> dict[str, Any]:
    fields = PROFILE | {"fingerprint": fingerprint(Path(folder)), "drop_layers": dropped}
    if not dropped:
        fields["dense_layers"] = [0, 1]
    profile.write_text(json.dumps(fields))
    engine = {
        "model": folder,
        "dtype": "float32",
        "max_model_len": 512,
        "kv_cache_memory_bytes": 32 << 20,
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "max_num_batched_tokens": 96,  # prompts are read in chunks, beside decode rows
        "attention_backend": method,
        "additional_config": {"vllm_ext": SETTINGS[method] | {"profile": str(profile)}},
    }
    job = {"prompts": _prompts(), "together": True, "max_tokens": NEW_TOKENS}
    return run_engine(engine, [job, job])  # the second time from the prefix cache


@pytest.mark.parametrize("method", SETTINGS)
def test_dropped_layers_attend_nothing(tiny: str, method: str, tmp_path: Path) -> None:
    expected = _greedy_without_layers(tiny, DROPPED)
    assert expected != _greedy_without_layers(tiny, [])  # or the test shows nothing
    answer = _run(tiny, method, tmp_path / "profile.json", DROPPED)
    for job in answer["jobs"]:
        assert [found["tokens"] for found in job] == expected


def test_the_same_memory_holds_more_tokens(tiny: str, tmp_path: Path) -> None:
    kept = _run(tiny, "TIDAL_DECODE", tmp_path / "kept.json", [])["num_blocks"]
    dropped = _run(tiny, "TIDAL_DECODE", tmp_path / "dropped.json", DROPPED)["num_blocks"]
    assert dropped == pytest.approx(kept * NUM_LAYERS / (NUM_LAYERS - len(DROPPED)), abs=1)
