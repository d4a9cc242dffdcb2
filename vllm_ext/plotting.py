"""matplotlib, where it is installed: pictures are a rest that reports do without."""

from __future__ import annotations

from typing import Any


def pyplot_if_installed() -> Any | None:
    """``matplotlib.pyplot`` that draws into files; None without it."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot
