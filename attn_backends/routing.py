"""Which groups of layers read everything for a request: decided by what its prompt attended.

Groups are nested: one is full only where all before it are. A route is a whole number whose bit
``g`` says that group ``g`` is full. It is decided once, when the prompt has been read, and holds
until the request ends, through preemptions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from attn_backends.config import ConfigError


@dataclass(frozen=True, eq=False)
class Router:
    """Logistic routers, one per group: a group asks to be full where its score is above 0.

    Attributes:
        weights: ``[groups, layers, kv_heads]`` fp64 on the host, on the gap mass per KV head.
        log_tokens: ``[groups]``, on the logarithm of the prompt's tokens.
        bias: ``[groups]``.
        evidence_tokens: last queries of a prompt over which the mass is a mean.
    """

    weights: torch.Tensor
    log_tokens: torch.Tensor
    bias: torch.Tensor
    evidence_tokens: int

    @classmethod
    def forced(cls, num_groups: int, num_layers: int, num_kv_heads: int, is_full: bool) -> Router:
        """Routes every request the same way, without evidence."""
        weights = torch.zeros(num_groups, num_layers, num_kv_heads, dtype=torch.float64)
        bias = torch.full((num_groups,), 1.0 if is_full else -1.0, dtype=torch.float64)
        return cls(weights, torch.zeros_like(bias), bias, 0)

    @property
    def num_groups(self) -> int:
        """Groups of layers that are routed."""
        return len(self.bias)

    @property
    def witnesses(self) -> tuple[int, ...]:
        """Layers whose attention is evidence: those with a weight."""
        return tuple((self.weights != 0).any(2).any(0).nonzero().flatten().tolist())

    @property
    def reread_tokens(self) -> int:
        """Last tokens of a prompt that must be computed even where their keys are cached."""
        return self.evidence_tokens if self.witnesses else 0

    def scores(self, mass: torch.Tensor, prompt_tokens: int) -> torch.Tensor:
        """Of every group, ``[groups]`` fp64.

        Args:
            mass: ``[layers, kv_heads]``, means over the evidence queries and query heads.
            prompt_tokens: 1 or more.
        """
        evidence = (self.weights * mass.double()).sum((1, 2))
        return evidence + self.log_tokens * math.log(prompt_tokens) + self.bias

    def route(self, mass: torch.Tensor, prompt_tokens: int) -> int:
        """The route that follows; arguments as of ``scores``."""
        asks = (self.scores(mass, prompt_tokens) > 0).tolist()
        depth = asks.index(False) if False in asks else len(asks)
        return full_groups(depth)


def full_groups(depth: int) -> int:
    """The route in which the first ``depth`` groups are full."""
    return (1 << depth) - 1


def is_full(route: int, group: int) -> bool:
    """Whether a group is full under a route."""
    return bool(route >> group & 1)


def read_router(
    content: bytes, shape: tuple[int, int, int], evidence_tokens: int, named: str
) -> Router:
    """A router from a safetensors file.

    Args:
        content: of the file.
        shape: groups, layers and KV heads.
        evidence_tokens: of the profile.
        named: what messages call the file.

    Raises:
        ConfigError: not such a file, or tensors of other names, types or shapes, or values that
            are not finite.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ConfigError(f"{named} is not a safetensors file: {error}") from None
    shapes = {"weights": shape, "log_tokens": shape[:1], "bias": shape[:1]}
    if tensors.keys() != shapes.keys():
        raise ConfigError(
            f"{named} has the tensors {', '.join(sorted(tensors)) or 'none'}; it must have "
            f"{', '.join(shapes)}"
        )
    for name, expected in shapes.items():
        found = tensors[name]
        if found.dtype != torch.float32 or tuple(found.shape) != expected:
            raise ConfigError(
                f"{named}: {name} is {found.dtype} {list(found.shape)}; it must be torch.float32 "
                f"{list(expected)}"
            )
        if not bool(found.isfinite().all()):
            raise ConfigError(f"{named}: {name} has values that are not finite")
    weights, log_tokens, bias = (tensors[name].double() for name in shapes)
    return Router(weights, log_tokens, bias, evidence_tokens)


class RouteBook:
    """Routes of the requests that are alive, and those that nobody was told of yet."""

    def __init__(self) -> None:
        self._routes: dict[str, int] = {}
        self._news: dict[str, int] = {}

    def get(self, request_id: str) -> int | None:
        """A request's route; None until it is decided."""
        return self._routes.get(request_id)

    def decide(self, request_id: str, route: int) -> None:
        """A request's route, once and for all; a later one is void."""
        if request_id not in self._routes:
            self._routes[request_id] = self._news[request_id] = route

    def forget(self, request_ids: Iterable[str]) -> None:
        """Requests ended."""
        for request_id in request_ids:
            self._routes.pop(request_id, None)
            self._news.pop(request_id, None)

    def take_news(self) -> dict[str, int]:
        """Routes that were decided since this was last asked, of requests that are alive."""
        taken, self._news = self._news, {}
        return taken
