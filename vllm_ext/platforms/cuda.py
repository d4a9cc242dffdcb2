"""The CUDA platform with our backends."""

from __future__ import annotations

from vllm.platforms.cuda import CudaPlatform

from vllm_ext.platforms.mixin import ExtPlatformMixin


class ExtCudaPlatform(ExtPlatformMixin, CudaPlatform):  # type: ignore[misc, valid-type]
    """vLLM on NVIDIA GPUs, with our attention backends selectable."""
