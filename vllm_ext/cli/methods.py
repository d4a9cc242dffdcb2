"""``vllm-ext methods``: the registry as a table."""

from __future__ import annotations

import argparse
import textwrap

from attn_backends.config import settings_of
from attn_backends.methods import REGISTRY, load_method


def settings_text(name: str) -> str:
    """A method's settings with defaults, ``key=default, ...``."""
    settings = settings_of(load_method(name).config_cls)
    return ", ".join(f"{name}={field.default}" for name, field in settings.items())


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
            "source": method.paper,
        }
        for label, text in rows.items():
            head = f"{name:<14}" if not label else f"  {label:<12}"
            lines.append(textwrap.fill(text, 92, initial_indent=head, subsequent_indent=" " * 14))
        lines.append("")
    return "\n".join(lines).rstrip()


def main(argv: list[str]) -> int:
    """Prints the table."""
    argparse.ArgumentParser(
        prog="vllm-ext methods", description="Methods for --attention-backend."
    ).parse_args(argv)
    print(table())
    return 0
