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
import tempfile
import time
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.cpp")
LIBRARY_NAME = "vllm_ext_kernels.so"
_CACHE_REMEDY = "Set XDG_CACHE_HOME to a folder that can be written"


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
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:  # a user without a home, as in some containers
        raise NativeBuildError(f"{error} {_CACHE_REMEDY}") from None
    cpu_info = Path("/proc/cpuinfo")
    features = ""
    if cpu_info.exists():
        lines = cpu_info.read_text().splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    identity = [SOURCE.read_text(), *_flags(), torch.__version__, platform.machine(), features]
    digest = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:16]
    return root / "vllm-ext" / "native" / digest


def library_path() -> Path:
    """Where the shared library for this machine is, or will be.

    Raises:
        NativeBuildError: this user has no cache folder.
    """
    return _cache_folder() / LIBRARY_NAME


def _search_path() -> str:
    """PATH for the build: ninja may be beside the interpreter of a virtual environment that is
    not activated. Empty entries, which would mean the current folder, are left out.
    """
    given = [entry for entry in os.environ.get("PATH", "").split(os.pathsep) if entry]
    folders = given or os.defpath.split(os.pathsep)
    return os.pathsep.join([str(Path(sys.executable).parent), *folders])


def build() -> Path:
    """Compiles the kernels unless the cache has them; safe to call from many processes.

    Returns:
        Path of the shared library.

    Raises:
        NativeBuildError: no C++ compiler, no folder to write to, or the compiler failed.
    """
    target = library_path()
    try:
        if not target.exists():
            _build_once(target)
    except OSError as error:
        raise NativeBuildError(
            f"the CPU kernels cannot be built in {target.parent} ({error.strerror or error}). "
            f"{_CACHE_REMEDY}"
        ) from None
    return target


def _build_once(target: Path) -> None:
    if shutil.which(os.environ.get("CXX", "g++"), path=_search_path()) is None:
        raise NativeBuildError(
            "no C++ compiler found for the CPU kernels; install one (Debian/Ubuntu: "
            "apt-get install g++) or choose --kernel reference, which is slow"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released by the kernel if this process dies
        if not target.exists():
            _compile(target)


def _compile(target: Path) -> None:
    """Builds in a folder that no other build has seen: torch locks it by a file that outlives a
    killed process, and would wait for that for ever. The caller holds the real lock, so what is
    left of other builds is of dead ones.
    """
    logger.warning("building the CPU kernels once for this machine (about half a minute) ...")
    started = time.monotonic()
    for stale in target.parent.glob("build-*"):
        shutil.rmtree(stale, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix="build-", dir=target.parent))
    try:
        _run_compiler(folder)
        os.replace(folder / LIBRARY_NAME, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    logger.warning("CPU kernels built in %.0f s: %s", time.monotonic() - started, target)


def _run_compiler(folder: Path) -> None:
    from torch.utils import cpp_extension

    before = os.environ.get("PATH")
    os.environ["PATH"] = _search_path()
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
        if before is None:
            del os.environ["PATH"]
        else:
            os.environ["PATH"] = before


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
