"""Routes of requests on their way from the worker, which decides them, to the scheduler, where KV
blocks are freed by them: an attribute of the model output, which vLLM carries anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any

from vllm.v1.outputs import (
    EMPTY_MODEL_RUNNER_OUTPUT,
    AsyncModelRunnerOutput,
    ModelRunnerOutput,
)

ATTRIBUTE = "vllm_ext_routes"


def with_routes(output: Any, routes: Mapping[str, int]) -> Any:
    """A model output that carries routes, by request id.

    Args:
        output: of a step; pickling it keeps the routes.
        routes: not empty.

    Raises:
        TypeError: not an output of vLLM's: the scheduler would never learn of the routes.
    """
    if isinstance(output, AsyncModelRunnerOutput):
        return _AsyncOutput(output, routes)
    if not isinstance(output, ModelRunnerOutput):
        raise TypeError(f"{type(output).__name__} cannot carry the routes of {sorted(routes)}")
    if output is EMPTY_MODEL_RUNNER_OUTPUT:  # shared by all steps
        output = copy(output)
    setattr(output, ATTRIBUTE, dict(routes))
    return output


def routes_of(output: Any) -> Mapping[str, int]:
    """What an output carries."""
    routes: Mapping[str, int] = getattr(output, ATTRIBUTE, {})
    return routes


class _AsyncOutput(AsyncModelRunnerOutput):
    """An output that is not on the host yet."""

    def __init__(self, output: AsyncModelRunnerOutput, routes: Mapping[str, int]) -> None:
        self._output, self._routes = output, routes

    def get_output(self) -> ModelRunnerOutput:
        """See ``AsyncModelRunnerOutput.get_output``."""
        return with_routes(self._output.get_output(), self._routes)
