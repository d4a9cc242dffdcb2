"""``vllm-ext bench``: decode time against stock vLLM, and the kernels one by one."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from attn_backends.methods import REGISTRY
from vllm_ext.bench import decode, kernel, kernel_report, workloads
from vllm_ext.bench.cases import OPS
from vllm_ext.cli.flags import add_setting_flags, setting_fields
from vllm_ext.errors import UserError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vllm-ext bench")
    benches = parser.add_subparsers(metavar="decode|kernel", required=True)
    decode_help = "time per output token, engines of several kinds in alternating runs"
    decode_parser = benches.add_parser("decode", help=decode_help, description=decode_help)
    decode_parser.set_defaults(bench=_decode)
    _add_decode_flags(decode_parser)
    kernel_help = "time of every op and implementation, each checked against the reference"
    kernel_parser = benches.add_parser("kernel", help=kernel_help, description=kernel_help)
    kernel_parser.set_defaults(bench=_kernel)
    _add_kernel_flags(kernel_parser)
    for bench in (decode_parser, kernel_parser):
        bench.add_argument("--output", type=Path, help="also write FILE.json and FILE.md")
    return parser


def _add_decode_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="models/smollm2-135m-instruct", help="model folder")
    parser.add_argument("--batch", type=_sizes, default=[8], help="requests at once: 8 or 1,8 (8)")
    parser.add_argument(
        "--context-tokens",
        type=_sizes,
        default=[4096],
        help="of each request: 4096 or 512,4096,7900 (4096); several also draw where it pays",
    )
    parser.add_argument("--rounds", type=int, default=7, help="alternating rounds (7)")
    parser.add_argument("--enforce-eager", action="store_true", help="no torch.compile, all arms")
    parser.add_argument(
        "--arms",
        default=f"{decode.STOCK},{decode.INSTALLED},SPARSE_FULL",
        help="comma-separated; stock (extension off), installed (no method chosen) or a "
        f"method: {', '.join(REGISTRY)}. Ratios are to the first",
    )
    add_setting_flags(parser)


def _add_kernel_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batches",
        default="8q1s4k,8q1s32k",
        help="comma-separated batches of [COUNT]qQUERYsCONTEXT terms joined by +: "
        f"{workloads.EXAMPLE} is 8 decode rows on 4,096 tokens each and one prefill chunk of "
        "512 tokens on 2,048 in all (8q1s4k,8q1s32k)",
    )
    parser.add_argument("--ops", default=",".join(OPS), help=f"of {', '.join(OPS)} (all)")
    parser.add_argument(
        "--impls",
        default="cpu,triton",
        help=f"of {', '.join(kernel.IMPLS)} (cpu,triton); the reference is slow. Dense baselines "
        "by others are always timed",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="(cuda where there is one)")
    parser.add_argument("--rounds", type=int, default=9, help="alternating rounds (9)")
    parser.add_argument(
        "--budget-tokens", type=int, default=512, help="what sparse_decode may read (512)"
    )
    shape = parser.add_argument_group("shape")
    shape.add_argument(
        "--shape", choices=workloads.PRESETS, default="demo", help="a model's (demo); or set it:"
    )
    for name in ("query-heads", "kv-heads", "head-size", "block-size"):
        shape.add_argument(f"--{name}", type=int, help="(the model's)")
    shape.add_argument("--dtype", choices=workloads.DTYPES, help="of cache and queries (bf16)")


def main(argv: list[str]) -> int:
    """Runs a benchmark and prints a Markdown table.

    Returns:
        0; 1 if a kernel disagreed with the reference.

    Raises:
        UserError: an unknown arm, op or implementation, a missing model, impossible sizes.
    """
    args = _parser().parse_args(argv)
    return int(args.bench(args))


def _decode(args: argparse.Namespace) -> int:
    arms = _names(args.arms)
    unknown = [n for n in arms if n not in (decode.STOCK, decode.INSTALLED, *REGISTRY)]
    if unknown:
        raise UserError(f"--arms: unknown {', '.join(unknown)}; see --help")
    if not Path(args.model, "config.json").is_file():
        raise UserError(f"--model: {args.model} is not a model folder; run vllm-ext demo-model")
    _require_positive(args, "rounds")
    settings = {key: value for key, value in vars(args).items() if key in setting_fields()}
    cells = tuple(
        decode.Cell(batch, context) for batch in args.batch for context in args.context_tokens
    )
    workload = decode.Workload(args.model, cells, args.enforce_eager, rounds=args.rounds)
    result = decode.run(workload, arms, settings, _echo)
    _report(result, decode.markdown(result), args.output)
    if args.output and decode.plot(result, args.output.with_suffix(".png")):
        _echo(f"drawn: {args.output.with_suffix('.png')}")
    return 0


def _kernel(args: argparse.Namespace) -> int:
    _require_positive(args, "rounds", "budget_tokens")
    has_cuda = torch.cuda.is_available()
    if args.device == "cuda" and not has_cuda:
        raise UserError("--device cuda: torch finds no CUDA device here; --device cpu works")
    device_type = args.device or ("cuda" if has_cuda else "cpu")
    given = {
        field.name: getattr(args, field.name)
        for field in dataclasses.fields(workloads.Shape)
        if getattr(args, field.name) is not None
    }
    shape = dataclasses.replace(workloads.preset(args.shape, device_type), **given)
    options = kernel.Options(
        device_type=device_type,
        ops=_known_names("--ops", args.ops, tuple(OPS)),
        impls=_known_names("--impls", args.impls, kernel.IMPLS),
        budget_tokens=args.budget_tokens,
        rounds=args.rounds,
    )
    result = kernel.run(workloads.parse_batches(args.batches), shape, options, _echo)
    _report(result, kernel_report.markdown(result), args.output)
    return int(any(row["failure"] for row in result["rows"]))


def _sizes(text: str) -> list[int]:
    sizes = [int(part) for part in text.split(",")]
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} has a size below 1")
    return sizes


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _known_names(flag: str, text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(_names(text))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"{flag}: unknown {', '.join(unknown)}; choose from {', '.join(known)}")
    return names


def _require_positive(args: argparse.Namespace, *fields: str) -> None:
    for field in fields:
        if getattr(args, field) < 1:
            raise UserError(f"--{field.replace('_', '-')} must be at least 1")


def _echo(line: str) -> None:
    print(line, flush=True)


def _report(result: dict[str, Any], table: str, output: Path | None) -> None:
    """Prints the table; with ``output`` also writes it and the raw figures."""
    print("\n" + table)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        output.with_suffix(".md").write_text(table + "\n")
