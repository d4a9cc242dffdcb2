"""The registry: one line per method. Everything else iterates it."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from attn_backends.method import Purpose, SparseMethod

REGISTRY: dict[str, str] = {
    "SPARSE_FULL": "attn_backends.methods.sparse_full:METHOD",
    "SINK_WINDOW": "attn_backends.methods.sink_window:METHOD",
    "MOA": "attn_backends.methods.moa:METHOD",
    "FLUX": "attn_backends.methods.flux:METHOD",
    "TIDAL_DECODE": "attn_backends.methods.tidal_decode:METHOD",
    "ORACLE_TOPK": "attn_backends.methods.oracle_topk:METHOD",
}


def load_method(name: str) -> SparseMethod:
    """The method registered under ``name``.

    Raises:
        KeyError: no such method; the message lists those there are.
    """
    try:
        module_name, attribute = REGISTRY[name].split(":")
    except KeyError:
        raise KeyError(f"unknown method {name!r}; known: {', '.join(REGISTRY)}") from None
    method: SparseMethod = getattr(import_module(module_name), attribute)
    return method


def compared_methods(*purposes: Purpose) -> list[str]:
    """Methods for these purposes that any checkpoint can be served with."""
    return methods_where(lambda one: one.purpose in purposes and not one.needs_profile)


def methods_where(fits: Callable[[SparseMethod], bool]) -> list[str]:
    """Names of the methods that something holds for, for default lists and messages."""
    return [name for name in REGISTRY if fits(load_method(name))]
