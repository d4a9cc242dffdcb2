"""``vllm-ext eval MODEL``: what the methods cost in fidelity, against dense."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from tqdm import tqdm

from attn_backends.checkpoint import read_model_config
from attn_backends.method import Purpose
from attn_backends.methods import REGISTRY, compared_methods
from vllm_ext.bench.machine import machine
from vllm_ext.cli.flags import add_dtype_flag, add_setting_flags, setting_fields
from vllm_ext.errors import UserError
from vllm_ext.evaluation import prompts, report
from vllm_ext.evaluation.run import ANSWER_TOKENS, Evaluation, Job, make_columns


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def _shares(text: str) -> list[float]:
    return [float(part) for part in text.split(",") if part]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm-ext eval",
        description="Needles and natural text, every method at every budget against dense. The "
        "full run takes about half an hour on two cores; of --methods one a third of it.",
    )
    parser.add_argument("model", help="model folder")
    parser.add_argument(
        "--methods",
        default=",".join(compared_methods(Purpose.SERVING, Purpose.BOUND)),
        help=f"comma-separated, of {', '.join(REGISTRY)} (%(default)s)",
    )
    parser.add_argument(
        "--budgets", type=_numbers, default=[256, 512, 1024], help="tokens (256,512,1024)"
    )
    parser.add_argument(
        "--lengths", type=_numbers, default=[2048, 4096, 7680], help="needle prompts, tokens"
    )
    parser.add_argument(
        "--depths", type=_shares, default=[0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95], help="0 to 1"
    )
    for kind, count in (("passkey", 5), ("multi-key", 1), ("multi-value", 1)):
        parser.add_argument(
            f"--{kind}",
            type=_numbers,
            default=[count],
            help=f"prompts per depth, of every length or 9,4,2 of the first, second ... ({count})",
        )
    parser.add_argument("--text-prompts", type=int, default=8, help="natural texts (8)")
    parser.add_argument("--text-tokens", type=int, default=4096, help="tokens of each (4096)")
    parser.add_argument("--text-steps", type=int, default=64, help="decode steps compared (64)")
    parser.add_argument(
        "--long-texts", type=int, default=2, help="texts scored up to the model's length (2)"
    )
    parser.add_argument("--corpus", type=Path, help="text file (default: Python's library)")
    parser.add_argument("--seed", type=int, default=0, help="for needles and texts (0)")
    parser.add_argument(
        "--kv-gib",
        type=float,
        help="KV pool of an engine (3, in float32 6; preemptions are errors)",
    )
    parser.add_argument("--output", type=Path, help="also write FILE.json, FILE.md and plots")
    add_dtype_flag(parser)
    add_setting_flags(parser)
    return parser


def _check(args: Any, methods: list[str]) -> None:
    unknown = [name for name in methods if name not in REGISTRY]
    if unknown:
        raise UserError(f"--methods: unknown {', '.join(unknown)}; known: {', '.join(REGISTRY)}")
    if not Path(args.model, "config.json").is_file():
        raise UserError(f"{args.model} is not a model folder (no config.json)")
    if args.corpus is not None and not args.corpus.is_file():
        raise UserError(f"--corpus: {args.corpus} does not exist")
    if not all(0 <= depth <= 1 for depth in args.depths):
        raise UserError(f"--depths is {args.depths}; each must be between 0 and 1")
    for name in ("budgets", "lengths"):
        if any(value < 64 for value in getattr(args, name)):
            raise UserError(f"--{name} is {getattr(args, name)}; each must be at least 64 tokens")
    for name in prompts.KINDS:
        counts = getattr(args, name)
        if len(counts) not in (1, len(args.lengths)) or min(counts) < 0:
            raise UserError(
                f"--{name.replace('_', '-')} is {counts}; give one count, or one for each of the "
                f"{len(args.lengths)} lengths, 0 or more"
            )
    for name in ("text_prompts", "long_texts"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; 0 or more")
    for name in ("text_tokens", "text_steps"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; 1 or more")


def main(argv: list[str]) -> int:
    """Evaluates, prints the table, writes the files.

    Raises:
        UserError: bad arguments, or an engine that does not start.
    """
    args = _parser().parse_args(argv)
    methods = [name.strip() for name in args.methods.split(",") if name.strip()]
    _check(args, methods)
    os.environ["HF_HUB_OFFLINE"] = "1"
    settings = {key: value for key, value in vars(args).items() if key in setting_fields()}
    columns = make_columns(methods, args.budgets, settings)
    config = read_model_config(Path(args.model))
    job = _job(args, config["max_position_embeddings"])
    total = (len(job.needles) + len(job.texts)) * len(columns)
    with tqdm(total=total, unit="answer") as bar:

        def progress(engine: str, count: int) -> None:
            bar.set_description(engine)
            bar.update(count)

        evaluation = Evaluation(job, columns, progress)
        evaluation.run(config["vocab_size"])
    result = {
        "columns": [column.name for column in columns],
        "workload": _workload(args, config),
        "machine": machine(),
        "needles": evaluation.needles,
        "texts": evaluation.texts,
        "nll_by_position": report.nll_by_position(evaluation.scores),
    }
    result["summary"] = report.summary(result)
    table = report.markdown(result)
    print("\n" + table)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        images = report.plots(result, args.output)
        links = [f"![{image.stem}]({image.name})" for image in images]
        args.output.with_suffix(".md").write_text("\n\n".join([table, *links]) + "\n")
    return 0


def _workload(args: Any, config: dict[str, Any]) -> dict[str, Any]:
    names = ("model", "budgets", "depths", "seed", "text_prompts", "text_tokens", "text_steps")
    return {name: getattr(args, name) for name in names} | {
        "lengths_tokens": args.lengths,
        "dtype": str(config.get("dtype") or config.get("torch_dtype"))
        if args.dtype == "auto"
        else args.dtype,
        "query_aware": False,  # no method knows the question while it reads the context
    }


def _per_length(counts: list[int], num_lengths: int) -> list[int]:
    return counts * num_lengths if len(counts) == 1 else counts


def _job(args: Any, max_positions: int) -> Job:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(args.model)
    longest = max([args.text_tokens + args.text_steps, *(n + ANSWER_TOKENS for n in args.lengths)])
    if longest > max_positions:
        raise UserError(
            f"prompts of {longest} tokens (--lengths, --text-tokens) do not fit the model's "
            f"{max_positions} positions"
        )
    counts = {kind: _per_length(getattr(args, kind), len(args.lengths)) for kind in prompts.KINDS}
    return Job(
        model=args.model,
        needles=prompts.needle_prompts(tokenizer, args.seed, counts, args.lengths, args.depths),
        texts=prompts.text_prompts(
            tokenizer, args.seed, args.text_prompts, args.text_tokens, args.corpus
        ),
        long_texts=prompts.text_prompts(
            tokenizer, args.seed + 1, args.long_texts, max_positions - 1, args.corpus
        ),
        text_steps=args.text_steps,
        decode=lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)),
        kv_bytes=int((args.kv_gib or (6 if args.dtype == "float32" else 3)) * (1 << 30)),
        max_model_len=max_positions if args.long_texts else longest,
        dtype=args.dtype,
    )
