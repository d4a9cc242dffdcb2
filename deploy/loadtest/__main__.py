"""Load test against servers that run, or servers that it starts one after another.

python -m deploy.loadtest --start --small
python -m deploy.loadtest --arm stock=http://127.0.0.1:8001 --arm TIDAL=http://127.0.0.1:8002
python -m deploy.loadtest --url http://127.0.0.1:8000 --workloads mixed --lengths 2048
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path
from typing import Any

from deploy.loadtest import grid, report
from deploy.loadtest.client import client_environment
from deploy.loadtest.endpoint import require_loopback
from deploy.loadtest.run import Arm, Plan, run
from deploy.loadtest.server import check_arms, serve_words
from deploy.loadtest.store import Store
from vllm_ext.bench.arms import serving_arms, timed_arms
from vllm_ext.bench.machine import machine
from vllm_ext.cli.flags import add_setting_flags, setting_fields
from vllm_ext.errors import ConfigError, UserError

_STARTED_S = time.monotonic()
_GRID_DEFAULTS: dict[str, Any] = {
    "workloads": list(grid.WORKLOADS),
    "lengths": [512, 2048, 6000],
    "outputs": [32, 128],
    "concurrency": [1, 4, 16],
    "requests_per_client": 2,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.loadtest",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_arm_flags(parser)
    loads = parser.add_argument_group("loads")
    loads.add_argument("--small", action="store_true", help="a fixed grid for a small machine")
    for name, text in (
        ("lengths", "prompt tokens"),
        ("outputs", "output tokens"),
        ("concurrency", "requests at once"),
    ):
        default = ",".join(map(str, _GRID_DEFAULTS[name]))
        loads.add_argument(f"--{name}", type=_sizes, metavar="N,N", help=f"{text} ({default})")
    workloads = "; ".join(f"{name}: {text}" for name, text in grid.WORKLOADS.items())
    loads.add_argument("--workloads", type=_names, metavar="NAME,NAME", help=f"{workloads} (all)")
    loads.add_argument("--requests-per-client", type=int, metavar="N", help="one after another (2)")
    loads.add_argument("--slo-ttft-ms", type=float, metavar="MS", help="bound of a good request")
    loads.add_argument("--slo-tpot-ms", type=float, metavar="MS", help="bound of a good request")
    loads.add_argument("--seed", type=int, default=0, help="of the prompts (0)")
    bounds = parser.add_argument_group("bounds")
    bounds.add_argument(
        "--max-minutes", type=float, help="then it stops (60; 10 with --small); starting included"
    )
    bounds.add_argument(
        "--max-requests", type=int, default=5000, help="a larger grid is refused (5000)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("build/loadtest"),
        help="writes FILE.json, FILE.md and FILE.html; finished cells in FILE.json are kept "
        "(build/loadtest)",
    )
    parser.add_argument("--note", metavar="TEXT", help="for the report's reader: commit, purpose")
    parser.add_argument("--fresh", action="store_true", help="start FILE.json anew")
    return parser


def _add_arm_flags(parser: argparse.ArgumentParser) -> None:
    running = parser.add_argument_group("servers that run (a key is read from VLLM_API_KEY)")
    running.add_argument("--url", help="of the only server, without /v1")
    running.add_argument(
        "--arm", action="append", default=[], metavar="NAME=URL", help="several; the first counts 1"
    )
    running.add_argument(
        "--metrics-url",
        action="append",
        default=[],
        metavar="NAME=URL",
        help="where an arm's figures are if not at URL/metrics (Ray's port; --url's is `server`)",
    )
    running.add_argument(
        "--allow-remote", action="store_true", help="load a server that is not on this machine"
    )
    running.add_argument("--tokenizer", help="folder or name (the served model's)")
    own = parser.add_argument_group("servers that it starts")
    own.add_argument("--start", action="store_true", help="start each arm on 127.0.0.1")
    own.add_argument("--arms", type=_names, metavar="NAME,NAME", help=f"({','.join(timed_arms())})")
    own.add_argument("--model", default="models/smollm2-135m-instruct", help="folder or name")
    own.add_argument("--port", type=int, default=8000, help="(8000)")
    own.add_argument(
        "--server-args", default="--enforce-eager", help="more flags of every server (%(default)s)"
    )
    add_setting_flags(parser)


def _sizes(text: str) -> list[int]:
    sizes = [int(part) for part in text.split(",")]
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return sizes


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def parse_pairs(flag: str, pairs: list[str]) -> dict[str, str]:
    """``NAME=VALUE`` words as a dictionary, in their order.

    Raises:
        UserError: no name, or a name twice.
    """
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name or "/" in name:
            raise UserError(f"{flag} is {pair!r}; it must be NAME=URL")
        if name in found:
            raise UserError(f"{flag}: {name} is given twice")
        found[name] = value.rstrip("/")
    return found


def running_arms(args: argparse.Namespace) -> list[Arm]:
    """Arms given by ``--url`` or ``--arm``.

    Raises:
        UserError: unknown names, or an address that is not on this machine.
    """
    urls = {"server": args.url.rstrip("/")} if args.url else parse_pairs("--arm", args.arm)
    metrics = parse_pairs("--metrics-url", args.metrics_url)
    if unknown := set(metrics) - set(urls):
        raise UserError(f"--metrics-url: no arm is named {', '.join(sorted(unknown))}")
    arms = [Arm(name, url, metrics.get(name, f"{url}/metrics")) for name, url in urls.items()]
    for arm in [] if args.allow_remote else arms:
        require_loopback("--url" if args.url else "--arm", arm.url)
        require_loopback("--metrics-url", arm.metrics_url)
    return arms


def started_arms(args: argparse.Namespace, cells: list[grid.Cell]) -> list[Arm]:
    """Arms that ``--start`` serves, each large enough for every cell.

    Raises:
        UserError: unknown names.
    """
    names = args.arms or (serving_arms() if args.small else timed_arms())
    check_arms(names)
    settings = {key: value for key, value in vars(args).items() if key in setting_fields()}
    longest_tokens = max(cell.prompt_tokens + cell.output_tokens for cell in cells)
    server_args = f"--max-model-len {longest_tokens + 64} {args.server_args}"
    url = f"http://127.0.0.1:{args.port}"
    return [
        Arm(
            name,
            url,
            f"{url}/metrics",
            tuple(serve_words(name, args.model, args.port, server_args, settings)),
        )
        for name in names
    ]


def make_cells(args: argparse.Namespace) -> list[grid.Cell]:
    """The cells that the flags ask for.

    Raises:
        UserError: contradicting flags, unknown workloads, or too many requests.
    """
    given = {name: getattr(args, name) for name in _GRID_DEFAULTS if getattr(args, name)}
    if args.small and given:
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        raise UserError(f"--small has its own grid; leave out {flags}, or leave out --small")
    wanted = _GRID_DEFAULTS | given
    unknown = [name for name in wanted["workloads"] if name not in grid.WORKLOADS]
    if unknown:
        known = ", ".join(grid.WORKLOADS)
        raise UserError(f"--workloads: unknown {', '.join(unknown)}; choose from {known}")
    if wanted["requests_per_client"] < 1:
        raise UserError("--requests-per-client must be at least 1")
    if args.small:
        return grid.small_grid()
    return grid.make_grid(
        wanted["workloads"],
        wanted["lengths"],
        wanted["outputs"],
        wanted["concurrency"],
        wanted["requests_per_client"],
    )


def _arms(args: argparse.Namespace, cells: list[grid.Cell]) -> list[Arm]:
    ways = {"--url": bool(args.url), "--arm": bool(args.arm), "--start": args.start}
    if sum(ways.values()) != 1:
        given = ", ".join(flag for flag, is_given in ways.items() if is_given) or "none"
        raise UserError(f"give one of --url, --arm and --start (given: {given}); see --help")
    arms = started_arms(args, cells) if args.start else running_arms(args)
    num_requests = len(arms) * sum(cell.num_requests for cell in cells)
    if num_requests > args.max_requests:
        raise UserError(
            f"this grid asks for {num_requests} requests, more than --max-requests "
            f"{args.max_requests}; make it smaller, or raise the bound"
        )
    return arms


def _run(args: argparse.Namespace) -> int:
    cells = make_cells(args)
    arms = _arms(args, cells)
    slo = {"ttft": args.slo_ttft_ms, "tpot": args.slo_tpot_ms}
    slo_ms = {name: bound for name, bound in slo.items() if bound is not None}
    settings = {"slo_ms": slo_ms, "seed": args.seed, "tokenizer": args.tokenizer}
    store = Store(args.output.with_suffix(".json"), settings, machine(), args.fresh)
    if args.note:
        store.add_note(args.note)
    env = client_environment(args.allow_remote)
    max_minutes = args.max_minutes or (10 if args.small else 60)
    deadline_s = time.monotonic() + 60 * max_minutes
    plan = Plan(cells, slo_ms, args.tokenizer, args.seed, deadline_s, env)
    _echo(f"{len(arms)} arms x {len(cells)} cells, at most {max_minutes:g} minutes")
    try:
        run(arms, plan, store, _echo)
    finally:
        store.save()
        if store.result["cells"]:
            for path in report.write(store.result, args.output):
                _echo(f"written: {path}")
    problems = report.error_lines(store.result)
    for line in problems:
        _echo(f"! {line}")
    if store.result["not_run"]:
        _echo("the same command again, without --fresh, keeps what is finished and runs the rest")
    return int(bool(problems))


def _echo(line: str) -> None:
    print(f"{time.monotonic() - _STARTED_S:5.0f} s  {line}", flush=True)


def _end(number: int, _: Any) -> None:
    """Turns SIGTERM into an orderly end, so that no server of ours is left behind."""
    sys.exit(128 + number)


def main(argv: list[str] | None = None) -> int:
    """Command line.

    Returns:
        0; 1 when a request failed or a cell was not run; 2 for a user error.
    """
    args = _parser().parse_args(argv)
    try:
        return _run(args)
    except (UserError, ConfigError) as error:
        print(f"loadtest: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _end)
    sys.exit(main())
