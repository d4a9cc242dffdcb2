"""``vllm-ext methods``: the registry as a table."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

from attn_backends.config import read_text, settings_of, takes_policy
from attn_backends.method import SparseMethod
from attn_backends.methods import REGISTRY, load_method
from vllm_ext.errors import UserError

MAX_PAGE_BYTES = 1 << 20
MARKERS = ("<!-- methods -->", "<!-- end of methods -->")  # where --write puts the table


def settings_text(name: str) -> str:
    """A method's settings with defaults, ``key=default, ...``."""
    settings = settings_of(load_method(name).config_cls)
    return ", ".join(f"{name}={field.default}" for name, field in settings.items())


def taken_text(method: SparseMethod) -> str:
    """What a method takes besides settings."""
    taken = ["a policy (--sparse-config)"] if takes_policy(method.config_cls) else []
    if method.row_options:
        taken.append(f"{', '.join(sorted(method.row_options))} of a request (vllm_xargs)")
    return "; ".join(taken) or "nothing"


def table() -> str:
    """All methods: what each reads, frees and cannot do."""
    lines = []
    for name in REGISTRY:
        method = load_method(name)
        rows = {
            "": method.summary,
            "reads": method.capabilities.reads,
            "frees": method.capabilities.frees,
            "limits": method.capabilities.limits,
            "settings": settings_text(name),
            "also takes": taken_text(method),
            "source": method.paper,
        }
        for label, text in rows.items():
            head = f"{name:<14}" if not label else f"  {label:<12}"
            lines.append(textwrap.fill(text, 92, initial_indent=head, subsequent_indent=" " * 14))
        lines.append("")
    return "\n".join(lines).rstrip()


def markdown() -> str:
    """All methods as the table of the README, a row each."""
    lines = [
        "| `--attention-backend` | what it does | reads | frees | limits |",
        "|---|---|---|---|---|",
    ]
    for name in REGISTRY:
        method = load_method(name)
        limits = method.capabilities
        cells = (f"`{name}`", method.summary, limits.reads, limits.frees, limits.limits)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def with_table(text: str) -> str:
    """A page with the table of today between its two markers.

    Raises:
        UserError: it has no such markers.
    """
    before, start, rest = text.partition(MARKERS[0])
    _, end, after = rest.partition(MARKERS[1])
    if not end:
        raise UserError(f"the file has no lines {' and '.join(MARKERS)} to put the table between")
    return f"{before}{start}\n\n{markdown()}\n\n{end}{after}"


def main(argv: list[str]) -> int:
    """Prints the table, or writes it into a page.

    Raises:
        UserError: the page is not there, or has no place for the table.
    """
    parser = argparse.ArgumentParser(
        prog="vllm-ext methods", description="Methods for --attention-backend."
    )
    parser.add_argument("--markdown", action="store_true", help="one row per method, as Markdown")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put that table into README.md")
    args = parser.parse_args(argv)
    if args.write is None:
        print(markdown() if args.markdown else table())
        return 0
    try:
        page = read_text(args.write, MAX_PAGE_BYTES, named=f"--write {args.write}")
        args.write.write_text(with_table(page))
    except OSError as error:
        raise UserError(f"--write {args.write}: {error.strerror}") from None
    return 0
