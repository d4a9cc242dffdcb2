"""Makes a LoRA adapter with random weights, so that ``deploy.chaos.fuzz`` can ask for one.

    python -m deploy.chaos.fuzz_adapter models/smollm2-135m-instruct tiny-lora
    vllm-ext serve models/smollm2-135m-instruct --enable-lora --lora-modules tiny=tiny-lora ...

Nobody trained it: its answers are other than the base model's, and nothing else is wanted of it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

TARGETS = ("q_proj", "v_proj")


def adapter_weights(config: dict[str, Any], rank: int, scale: float) -> dict[str, torch.Tensor]:
    """Random low-rank weights under PEFT's names, for every attention layer.

    Args:
        config: the model's ``config.json``, of a Llama-like model.
        rank: of the adapter.
        scale: standard deviation of what the adapter adds to a projection of unit inputs.
    """
    heads = {"q_proj": "num_attention_heads", "v_proj": "num_key_value_heads"}
    head_size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    draw = torch.Generator().manual_seed(0)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for target in TARGETS:
            name = f"base_model.model.model.layers.{layer}.self_attn.{target}"
            num_outputs = config[heads[target]] * head_size
            down = torch.randn(rank, config["hidden_size"], generator=draw)
            up = torch.randn(num_outputs, rank, generator=draw)
            weights[f"{name}.lora_A.weight"] = down / config["hidden_size"] ** 0.5
            weights[f"{name}.lora_B.weight"] = scale * up / rank**0.5
    return weights


def make_adapter(model: Path, folder: Path, rank: int = 8, scale: float = 0.5) -> None:
    """Writes ``adapter_config.json`` and ``adapter_model.safetensors`` into ``folder``."""
    config = json.loads((model / "config.json").read_text())
    folder.mkdir(parents=True, exist_ok=True)
    save_file(adapter_weights(config, rank, scale), folder / "adapter_model.safetensors")
    description = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model),
        "r": rank,
        "lora_alpha": rank,  # a factor of 1
        "target_modules": list(TARGETS),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(description, indent=1) + "\n")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m deploy.chaos.fuzz_adapter",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, help="model folder")
    parser.add_argument("folder", type=Path, help="where the adapter is written")
    args = parser.parse_args()
    make_adapter(args.model, args.folder)
    print(f"adapter written to {args.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
