"""``vllm-ext bench``: decode time against stock vLLM, and the kernels one by one."""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from attn_backends.checkpoint import read_model_config
from attn_backends.config import settings_of
from attn_backends.methods import REGISTRY, load_method
from vllm_ext.bench import capacity, decode, decode_report, kernel, kernel_report, shapes, workloads
from vllm_ext.bench.arms import freeing_arms
from vllm_ext.bench.cases import OPS
from vllm_ext.bench.decode_workload import Cell, Workload, parse_cells
from vllm_ext.cli import bench_flags
from vllm_ext.cli.flags import parse_setting, setting_fields
from vllm_ext.errors import UserError

# Where steps are short, on GPUs, or bring several tokens: a difference of 32 would be noise.
LONG_TOKENS = 136


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vllm-ext bench")
    benches = parser.add_subparsers(metavar="decode|capacity|kernel", required=True)
    for name, bench, add_flags, text in (
        (
            "decode",
            _decode,
            bench_flags.add_decode_flags,
            "time per output token, engines of several kinds in alternating runs",
        ),
        (
            "capacity",
            _capacity,
            bench_flags.add_capacity_flags,
            "how many long requests decode at once in the same KV pool",
        ),
        (
            "kernel",
            _kernel,
            bench_flags.add_kernel_flags,
            "time of every op and implementation, each checked against the reference",
        ),
    ):
        one = benches.add_parser(name, help=text, description=text)
        one.set_defaults(bench=bench)
        add_flags(one)
        bench_flags.add_common_flags(one, starts_engines=bench is not _kernel)
    return parser


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
    arms = [parse_arm(text) for text in _names(args.arms)]
    if len({arm.name for arm in arms}) < len(arms):
        raise UserError(f"--arms: {args.arms} names an arm twice")
    _require_positive(args, "rounds")
    settings = {key: value for key, value in vars(args).items() if key in setting_fields()}
    with tempfile.TemporaryDirectory() as scratch:
        result = decode.run(_workload(args, arms, Path(scratch)), arms, settings, _echo)
    _report(result, decode_report.markdown(result), args.output)
    if args.output and decode_report.plot(result, args.output.with_suffix(".png")):
        _echo(f"drawn: {args.output.with_suffix('.png')}")
    return 0


def _workload(args: argparse.Namespace, arms: list[decode.Arm], scratch: Path) -> Workload:
    """The workload; a model's shape and layer roles that were given are written to ``scratch``."""
    cells = tuple(Cell(batch, context) for batch in args.batch for context in args.context_tokens)
    workload = Workload(
        args.model,
        parse_cells(args.cells) if args.cells is not None else cells,
        args.dtype,
        args.enforce_eager,
        rounds=args.rounds,
        compilation_config=bench_flags.compilation_config(args.compilation_config),
        times_ttft=args.ttft,
        is_text=args.text,
    )
    if torch.cuda.is_available() or args.text:
        workload = dataclasses.replace(workload, long_tokens=LONG_TOKENS)
    if args.text and args.shape is not None:
        raise UserError("--text needs a --model, which has a tokenizer; --shape has none")
    if args.shape is not None:
        workload = _with_random_model(workload, args, scratch)
    elif args.layers is not None:
        raise UserError("--layers needs --shape; a model folder has the layers that it has")
    elif not Path(args.model, "config.json").is_file():
        raise UserError(
            f"--model: {args.model} is not a model folder; run vllm-ext demo-model, or give a "
            "--shape, which needs none"
        )
    given = (args.dense_layers, args.anchor_layers)
    have_anchors = any(shapes.reads_anchors(arm.engine) for arm in arms)
    if given == (None, None):
        if args.shape is None or "profile" in vars(args) or not have_anchors:
            return workload
    elif "profile" in vars(args):
        raise UserError("--anchor-layers and --dense-layers stand for --profile; give either")
    elif not have_anchors:
        readers = " or ".join(filter(shapes.reads_anchors, REGISTRY))
        raise UserError(f"--anchor-layers: no arm of {args.arms} has anchors; add {readers}")
    return _with_layer_roles(workload, *given, scratch / "profile.json")


def _with_random_model(workload: Workload, args: argparse.Namespace, folder: Path) -> Workload:
    shape = shapes.SHAPES[args.shape]
    layers = shape.num_hidden_layers if args.layers is None else args.layers
    if layers < 1:
        raise UserError(f"--layers is {layers}; it must be at least 1")
    shapes.write_model(folder, shape, layers, workload.max_model_len)
    return dataclasses.replace(
        workload,
        model=str(folder),
        title=f"{args.shape} with {layers} layers of random weights",
        random_parameters=shape.num_parameters(layers),
    )


def _with_layer_roles(
    workload: Workload, dense: list[int] | None, anchors: list[int] | None, profile: Path
) -> Workload:
    """With a profile that gives these roles, and the defaults where one of them is None."""
    folder = Path(workload.model)
    dense_layers = shapes.DEFAULT_DENSE_LAYERS if dense is None else dense
    anchor_layers = anchors
    if anchor_layers is None:
        num_layers = read_model_config(folder)["num_hidden_layers"]
        anchor_layers = list(shapes.default_anchor_layers(num_layers))
    shapes.write_profile(profile, folder, dense_layers, anchor_layers)
    roles = f"dense layers {[*dense_layers]}, anchors {anchor_layers}"
    title = f"{workload.title or workload.model}, {roles}"
    return dataclasses.replace(workload, title=title, profile=str(profile))


def parse_arm(text: str) -> decode.Arm:
    """An arm from ``ENGINE`` or ``METHOD:setting=value:...``, such as ``EXAMPLE_ARM``.

    Raises:
        UserError: an unknown engine or setting, or a value of another type.
    """
    engine, *pairs = text.split(":")
    _known_names("--arms", engine, (decode.STOCK, decode.INSTALLED, *REGISTRY))
    known_fields = settings_of(load_method(engine).config_cls) if engine in REGISTRY else {}
    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or key not in known_fields:
            raise UserError(
                f"--arms: {pair!r} is no setting=value of {engine}, which knows "
                f"{', '.join(known_fields) or 'none'}; {bench_flags.EXAMPLE_ARM} works"
            )
        try:
            settings[key] = parse_setting(str(known_fields[key].type), value)
        except ValueError as error:
            raise UserError(f"--arms: {key} {error}") from None
    return decode.Arm(text, engine, settings)


def _capacity(args: argparse.Namespace) -> int:
    if not Path(args.model, "config.json").is_file():
        raise UserError(f"--model: {args.model} is not a model folder; run vllm-ext demo-model")
    names = [field.name for field in dataclasses.fields(capacity.Load)]
    _require_positive(args, *(name for name in names if name not in ("model", "dtype", "seed")))
    positions = read_model_config(Path(args.model))["max_position_embeddings"]
    if args.context_tokens + args.new_tokens > positions:
        raise UserError(
            f"--context-tokens {args.context_tokens} + --new-tokens {args.new_tokens} must be at "
            f"most the model's {positions} positions"
        )
    load = capacity.Load(**{name: getattr(args, name) for name in names if name != "seed"})
    settings = {key: value for key, value in vars(args).items() if key in setting_fields()}
    if args.arms is None:
        arms = freeing_arms(Path(args.model), settings)
    else:
        arms = list(_known_names("--arms", args.arms, (decode.STOCK, *REGISTRY)))
    result = capacity.run(load, arms, settings, _echo)
    _report(result, capacity.markdown(result), args.output)
    return 0


def _kernel(args: argparse.Namespace) -> int:
    _require_positive(args, "rounds")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device here; --device cpu works")
    device_type = args.device or bench_flags.device_type()
    default = bench_flags.KERNEL_DEFAULTS[device_type]
    given = {
        name: getattr(args, name)
        for name in ("query_heads", "kv_heads", "head_size", "dtype")
        if getattr(args, name) is not None
    }
    shapes_of_layers = [
        dataclasses.replace(workloads.preset(args.shape or default.shape, block_size), **given)
        for block_size in args.block_size or default.block_sizes
    ]
    budget_tokens, budget_share = bench_flags.budget(args.budget_tokens or default.budget)
    options = kernel.Options(
        device_type=device_type,
        ops=_known_names("--ops", args.ops, tuple(OPS)),
        impls=_known_names("--impls", args.impls or default.impls, kernel.IMPLS[device_type]),
        budget_tokens=budget_tokens,
        budget_share=budget_share,
        rounds=args.rounds,
    )
    specs = workloads.parse_batches(args.batches or default.batches)
    result = kernel.run(specs, shapes_of_layers, options, _echo)
    _report(result, kernel_report.markdown(result), args.output)
    return int(any(row["failure"] for row in result["rows"]))


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
