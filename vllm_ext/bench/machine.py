"""Where the figures come from."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from vllm_ext.plugin import vllm_version


def machine() -> dict[str, str]:
    """Processor, GPU (``none`` without one) and versions; of a GPU also driver, torch and CUDA."""
    cpu = "unknown"
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), cpu)
    facts = {
        "cpu": f"{os.cpu_count()} x {cpu}",
        "python": platform.python_version(),
        "vllm": vllm_version(),
        "gpu": "none",
    }
    if torch.cuda.is_available():
        facts |= {
            "gpu": torch.cuda.get_device_name(),
            "driver": _driver(),
            "torch": torch.__version__,
            "cuda": str(torch.version.cuda),
        }
    return facts


def versions(facts: dict[str, str]) -> str:
    """Of ``machine``'s facts those that belong to a GPU's name in a table."""
    parts = [f"vLLM {facts['vllm']}"]
    parts += [f"{name} {facts[name]}" for name in ("torch", "driver") if name in facts]
    return ", ".join(parts)


def _driver() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown"
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    said = subprocess.run(query, capture_output=True, text=True).stdout.split()
    return said[0] if said else "unknown"
