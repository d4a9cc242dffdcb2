"""C++ kernels for CPUs, compiled once per machine by torch's extension builder.

The shared library is cached under ``$XDG_CACHE_HOME/vllm-ext/native/<hash>/``; the hash
covers the source, the compiler flags, torch's version and the CPU's features, so a stale
or foreign library is never loaded. ``python -m attn_backends.native`` builds it ahead.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import sys
import time
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.cpp")
LIBRARY_NAME = "vllm_ext_kernels.so"


class NativeBuildError(RuntimeError):
    """The kernels cannot be built here; the message says what to install."""


def _flags() -> list[str]:
    flags = ["-O3", "-std=c++20", "-fopenmp", "-fno-math-errno", "-DNDEBUG"]
    capability = torch.backends.cpu.get_cpu_capability()
    if capability in ("AVX512", "AVX2"):
        flags += ["-march=native", f"-DCPU_CAPABILITY_{capability}"]
        flags += [f"-DCPU_CAPABILITY={capability}"]
    return flags


def _cache_folder() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cpu_info = Path("/proc/cpuinfo")
    features = ""
    if cpu_info.exists():
        lines = cpu_info.read_text().splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    identity = [SOURCE.read_text(), *_flags(), torch.__version__, platform.machine(), features]
    digest = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:16]
    return root / "vllm-ext" / "native" / digest


def library_path() -> Path:
    """Where the shared library for this machine is, or will be."""
    return _cache_folder() / LIBRARY_NAME


def build() -> Path:
    """Compiles the kernels unless the cache has them; safe to call from many processes.

    Returns:
        Path of the shared library.

    Raises:
        NativeBuildError: no C++ compiler, or the compiler failed.
    """
    target = library_path()
    if target.exists():
        return target
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        raise NativeBuildError(
            "no C++ compiler found for the CPU kernels; install one (Debian/Ubuntu: "
            "apt-get install g++) or choose --kernel reference, which is slow"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released by the kernel if this process dies
        if not target.exists():
            _compile(target)
    return target


def _compile(target: Path) -> None:
    from torch.utils import cpp_extension

    logger.warning("building the CPU kernels once for this machine (about half a minute) ...")
    started = time.monotonic()
    folder = target.parent / f"build-{os.getpid()}"
    folder.mkdir(exist_ok=True)
    # torch looks for ninja on PATH; in a virtual environment that is not activated it is
    # beside the interpreter.
    path_before = os.environ.get("PATH", "")
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{path_before}"
    try:
        cpp_extension.load(
            name="vllm_ext_kernels",
            sources=[str(SOURCE)],
            extra_cflags=_flags(),
            extra_ldflags=["-fopenmp"],
            build_directory=str(folder),
            is_python_module=False,
            is_standalone=False,
        )
    except RuntimeError as error:
        raise NativeBuildError(f"the CPU kernels did not compile: {error}") from error
    finally:
        os.environ["PATH"] = path_before
    os.replace(folder / LIBRARY_NAME, target)
    shutil.rmtree(folder, ignore_errors=True)
    logger.warning("CPU kernels built in %.0f s: %s", time.monotonic() - started, target)


@functools.cache
def load() -> None:
    """Makes ``torch.ops.vllm_ext`` available, building the library if need be.

    Raises:
        NativeBuildError: see ``build``.
    """
    path = build()
    if not hasattr(torch.ops.vllm_ext, "sparse_decode"):  # _compile has loaded it already
        torch.ops.load_library(str(path))


@functools.cache
def unavailable_reason() -> str | None:
    """None when the kernels are loaded, else why they cannot be."""
    try:
        load()
    except (NativeBuildError, OSError) as error:
        return str(error)
    return None
