"""``vllm-ext bench decode``: decode time against stock vLLM."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from attn_backends.methods import REGISTRY
from vllm_ext.bench import decode
from vllm_ext.cli.flags import add_setting_flags, setting_fields
from vllm_ext.errors import UserError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vllm-ext bench")
    parser.add_argument("what", choices=["decode"], help="time per output token")
    parser.add_argument("--model", default="models/smollm2-135m-instruct", help="model folder")
    parser.add_argument("--batch", type=int, default=8, help="requests at once (8)")
    parser.add_argument("--context-tokens", type=int, default=4096, help="per request (4096)")
    parser.add_argument("--rounds", type=int, default=7, help="alternating rounds (7)")
    parser.add_argument(
        "--arms",
        default=f"{decode.STOCK},{decode.INSTALLED},SPARSE_FULL",
        help="comma-separated; stock (extension off), installed (no method chosen) or a "
        f"method: {', '.join(REGISTRY)}. Ratios are to the first",
    )
    parser.add_argument("--output", type=Path, help="also write FILE.json and FILE.md")
    add_setting_flags(parser)
    return parser


def main(argv: list[str]) -> int:
    """Runs the benchmark and prints a Markdown table.

    Raises:
        UserError: an unknown arm, a missing model or impossible sizes.
    """
    args = _parser().parse_args(argv)
    arms = [name.strip() for name in args.arms.split(",")]
    unknown = [n for n in arms if n not in (decode.STOCK, decode.INSTALLED, *REGISTRY)]
    if unknown:
        raise UserError(f"--arms: unknown {', '.join(unknown)}; see --help")
    if not Path(args.model, "config.json").is_file():
        raise UserError(f"--model: {args.model} is not a model folder; run vllm-ext demo-model")
    for field in ("batch", "context_tokens", "rounds"):
        if getattr(args, field) < 1:
            raise UserError(f"--{field.replace('_', '-')} must be at least 1")
    settings = {key: value for key, value in vars(args).items() if key in setting_fields()}
    workload = decode.Workload(args.model, args.batch, args.context_tokens, rounds=args.rounds)
    result = decode.run(workload, arms, settings, lambda line: print(line, flush=True))
    table = decode.markdown(result)
    print("\n" + table)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        args.output.with_suffix(".md").write_text(table + "\n")
    return 0
