"""Choice of an op's implementation, made once at start-up.

Every implementation module exposes ``run(...)`` and ``unsupported_reason(context)``.
An explicit request is honoured or refused, never replaced.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from attn_backends.config import ConfigError
from kvcache.layout import PagedKVLayout

logger = logging.getLogger(__name__)

# No reference on CUDA: it waits for the device once per row, and nobody would notice why.
AUTO_ORDER = {"cpu": ("engine", "cpu", "reference"), "cuda": ("engine", "triton")}


@dataclass(frozen=True)
class OpContext:
    """What an implementation needs to know to say whether it can serve."""

    layout: PagedKVLayout
    num_query_heads: int
    device_type: str  # "cpu" or "cuda"
    with_rule: bool  # a SpanRule will be given
    has_plain_windows: bool = False  # each layer's rule is one window (``SpanRule.span``)


@dataclass(frozen=True)
class OpImpl:
    """One implementation of one op.

    Attributes:
        op: the op's name.
        name: ``engine``, ``cpu``, ``triton`` or ``reference``.
        run: the callable; its signature is the one documented in the op's ``api.py``.
        unsupported_reason: None when it can serve the context, else a short reason.
    """

    op: str
    name: str
    run: Callable[..., None]
    unsupported_reason: Callable[[OpContext], str | None]


@functools.cache
def _warn_once(reasons: str) -> None:
    """Every op of every layer geometry asks, mostly for the same reasons."""
    logger.warning("some ops run on their slow reference implementation (%s)", reasons)


def resolve(impls: Sequence[OpImpl], context: OpContext, requested: str = "auto") -> OpImpl:
    """The implementation to use.

    Args:
        impls: all implementations of one op.
        context: what must be served.
        requested: an implementation's name, or ``auto``.

    Raises:
        ConfigError: nothing fits; the message has every implementation's reason.
    """
    op = impls[0].op
    by_name = {impl.name: impl for impl in impls}
    order = AUTO_ORDER[context.device_type] if requested == "auto" else (requested,)
    reasons = []
    for name in order:
        if name not in by_name:
            if requested != "auto":
                reasons.append(f"{name}: no such implementation of {op}")
            continue
        reason = by_name[name].unsupported_reason(context)
        if reason is None:
            if requested == "auto" and name == "reference":
                _warn_once("; ".join(reasons))
            return by_name[name]
        reasons.append(f"{name}: {reason}")
    raise ConfigError(f"no implementation of {op} can serve this set-up ({'; '.join(reasons)})")
