"""The CPU platform (or its Zen variant) with our backends."""

from __future__ import annotations

from typing import Any

from vllm.platforms import cpu_platform_plugin
from vllm.utils.import_utils import resolve_obj_by_qualname

from vllm_ext.platforms.mixin import ExtPlatformMixin

_base: Any = resolve_obj_by_qualname(cpu_platform_plugin() or "vllm.platforms.cpu.CpuPlatform")


class ExtCpuPlatform(ExtPlatformMixin, _base):  # type: ignore[misc]
    """vLLM on CPU, with our attention backends selectable."""

    @classmethod
    def get_punica_wrapper(cls) -> str:
        """vLLM's hook: what multiplies by adapters, mended."""
        return "attn_backends.adapter.compat_lora.ExtPunicaWrapperCPU"
