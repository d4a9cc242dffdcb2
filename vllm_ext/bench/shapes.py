"""Models of known shape for benchmarks: what of a model decides its speed, without its weights.

Time does not depend on what the weights are. So a benchmark of a large model needs its shape
alone: a ``config.json`` that vLLM loads with random weights, and for methods that read a profile
one that says which layers are anchors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from attn_backends.checkpoint import fingerprint, read_model_config
from attn_backends.methods import REGISTRY, load_method
from attn_backends.profile import SCHEMA_VERSION, Profile
from vllm_ext.errors import UserError

DEFAULT_DENSE_LAYERS = (0,)
_ANCHOR_FIELDS = {"dense_layers", "anchor_layers", "head_maps"}  # of a profile's section

_COMMON = {
    "hidden_act": "silu",
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "mlp_bias": False}
_QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}


@dataclass(frozen=True)
class ModelShape:
    """A dense decoder; its fields but the first are those of ``config.json``."""

    family: Mapping[str, Any]
    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rope_theta: float
    rms_norm_eps: float
    tie_word_embeddings: bool

    def config(self, num_layers: int, positions: int) -> dict[str, Any]:
        """Content of ``config.json``.

        Args:
            num_layers: instead of the model's own.
            positions: tokens of the longest request; random weights have learnt none, so there
                may be more than the model has.
        """
        sizes = {key: value for key, value in asdict(self).items() if key != "family"}
        longest = max(positions, self.max_position_embeddings)
        changed = {"num_hidden_layers": num_layers, "max_position_embeddings": longest}
        return {**_COMMON, **self.family, **sizes, **changed}

    def num_parameters(self, num_layers: int) -> int:
        """Weights of the model with that many layers."""
        hidden, head_dim = self.hidden_size, self.head_dim
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
        norms = 2 * hidden + (2 * head_dim if self.family is _QWEN3 else 0)
        layer = attention + 3 * hidden * self.intermediate_size + norms
        embeddings = self.vocab_size * hidden * (1 if self.tie_word_embeddings else 2)
        return num_layers * layer + embeddings + hidden


# Layers, hidden and intermediate size, query and KV heads, head size, vocabulary, positions,
# RoPE's base (its scaling costs nothing in a step and is left out), epsilon, tied embeddings.
SHAPES = {
    "demo": ModelShape(_LLAMA, 30, 576, 1536, 9, 3, 64, 49152, 8192, 1e5, 1e-5, True),
    "llama-3.2-1b": ModelShape(
        _LLAMA, 16, 2048, 8192, 32, 8, 64, 128256, 131072, 5e5, 1e-5, True
    ),
    "llama-3.1-8b": ModelShape(
        _LLAMA, 32, 4096, 14336, 32, 8, 128, 128256, 131072, 5e5, 1e-5, False
    ),
    "qwen3-8b": ModelShape(_QWEN3, 36, 4096, 12288, 32, 8, 128, 151936, 40960, 1e6, 1e-6, False),
}  # fmt: skip


def write_model(folder: Path, shape: ModelShape, num_layers: int, positions: int) -> None:
    """A model folder without weights and tokenizer, for ``load_format="dummy"``."""
    config = shape.config(num_layers, positions)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def default_anchor_layers(num_layers: int) -> tuple[int, ...]:
    """Anchors of a model that nobody has calibrated: behind the first dense layer, and halfway."""
    return (1,) if num_layers <= 8 else (1, num_layers // 2)


def reads_anchors(method: str) -> bool:
    """Whether the method takes dense and anchor layers from a profile."""
    section = load_method(method).profile_section if method in REGISTRY else None
    return section is not None and {*section.model_fields} >= _ANCHOR_FIELDS


def write_profile(
    path: Path, model_folder: Path, dense_layers: Sequence[int], anchor_layers: Sequence[int]
) -> None:
    """A profile that gives layers their roles, for every method that reads anchors.

    Args:
        path: of the profile.
        model_folder: with ``config.json``.
        dense_layers: attend everything.
        anchor_layers: choose for those after them.

    Raises:
        UserError: not of this model; names the field.
    """
    config = read_model_config(model_folder)
    kv_heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    profile = Profile(
        schema_version=SCHEMA_VERSION,
        fingerprint=fingerprint(model_folder),
        model="a benchmark's, not calibrated",
        num_layers=config["num_hidden_layers"],
        num_kv_heads=kv_heads,
        calibration={},
    )
    roles = {"dense_layers": [*dense_layers], "anchor_layers": [*anchor_layers], "head_maps": {}}
    for name in filter(reads_anchors, REGISTRY):
        section_cls = load_method(name).profile_section
        assert section_cls is not None
        try:
            profile = profile.with_section(name, section_cls(**roles))
        except ValueError as error:
            raise UserError(f"--dense-layers, --anchor-layers: {error}") from None
    path.write_text(profile.model_dump_json(indent=1) + "\n")
