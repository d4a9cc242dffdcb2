"""A Llama model in a GGUF file as a Hugging Face folder: config, tokenizer, bf16 weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

# GGUF tensor names -> those of LlamaForCausalLM; "{}" is the layer index.
TOP_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

Echo = Callable[[str], None]


def unpermute_rotary_rows(weight: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """Undoes GGUF's reordering of the rows of a Llama q or k projection.

    GGUF interleaves the two halves that rotary embedding pairs; Hugging Face keeps them apart.

    Args:
        weight: ``[num_heads * head_size, hidden_size]`` as in the GGUF file.
        num_heads: query heads for q, KV heads for k.

    Returns:
        The same rows in Hugging Face's order.
    """
    num_rows, hidden_size = weight.shape
    pairs = weight.reshape(num_heads, num_rows // num_heads // 2, 2, hidden_size)
    return pairs.swapaxes(1, 2).reshape(num_rows, hidden_size)


def _metadata(reader: Any) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items()}


def _hf_name(gguf_name: str) -> str:
    if gguf_name in TOP_TENSORS:
        return TOP_TENSORS[gguf_name]
    _, layer, kind, _ = gguf_name.split(".")
    return f"model.layers.{layer}.{LAYER_TENSORS[kind]}.weight"


def read_weights(reader: Any, num_heads: int, num_kv_heads: int) -> dict[str, torch.Tensor]:
    """All tensors of the GGUF file, dequantized to bf16 under Hugging Face's names."""
    import gguf
    import torch

    weights = {}
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if tensor.name.endswith("attn_q.weight"):
            values = unpermute_rotary_rows(values, num_heads)
        elif tensor.name.endswith("attn_k.weight"):
            values = unpermute_rotary_rows(values, num_kv_heads)
        # A copy: the reader's memory map is read-only.
        weights[_hf_name(tensor.name)] = torch.tensor(values).to(torch.bfloat16).contiguous()
    return weights


def llama_config(metadata: dict[str, Any]) -> Any:
    """The `LlamaConfig` that the GGUF metadata describes; embeddings are tied."""
    import numpy as np
    from transformers import LlamaConfig

    hidden_size = metadata["llama.embedding_length"]
    num_heads = metadata["llama.attention.head_count"]
    eps = np.float32(metadata["llama.attention.layer_norm_rms_epsilon"])
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=metadata["llama.vocab_size"],
        hidden_size=hidden_size,
        intermediate_size=metadata["llama.feed_forward_length"],
        num_hidden_layers=metadata["llama.block_count"],
        num_attention_heads=num_heads,
        num_key_value_heads=metadata["llama.attention.head_count_kv"],
        head_dim=hidden_size // num_heads,
        max_position_embeddings=metadata["llama.context_length"],
        rms_norm_eps=float(str(eps)),  # the shortest decimal: 1e-05
        rope_parameters={
            "rope_type": "default",
            "rope_theta": float(metadata["llama.rope.freq_base"]),
        },
        bos_token_id=metadata["tokenizer.ggml.bos_token_id"],
        eos_token_id=metadata["tokenizer.ggml.eos_token_id"],
        pad_token_id=metadata["tokenizer.ggml.padding_token_id"],
        tie_word_embeddings=True,
        dtype="bfloat16",
    )


def _save_tokenizer(gguf_path: Path, context_length: int, folder: Path) -> None:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)
    # transformers ignores tokenizer.ggml.pre = "smollm": every digit is a token of its own.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.model_max_length = context_length
    tokenizer.save_pretrained(folder)


def convert(gguf_path: Path, folder: Path, echo: Echo) -> None:
    """Writes config, tokenizer and bf16 weights of a GGUF Llama into a folder.

    Args:
        gguf_path: the GGUF file.
        folder: an existing folder; nothing but the model is written there.
        echo: takes progress messages.
    """
    from gguf import GGUFReader
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    reader = GGUFReader(gguf_path)
    config = llama_config(_metadata(reader))
    echo("dequantizing the weights to bf16")
    weights = read_weights(reader, config.num_attention_heads, config.num_key_value_heads)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    ).save_pretrained(folder)
    echo("converting the tokenizer")
    _save_tokenizer(gguf_path, config.max_position_embeddings, folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes for the owner only
