"""How little a layer's attention changes its input: LLM-Drop's measure (TMLR 2026, github.com/
CASE-Lab-UMD/LLM-Drop).

``S = 1 - cos(X, X + Attn(LN(X)))``, the mean over the tokens of a prompt. Layers of least S are
the ones that dropping changes least. We differ: the paper drops the whole sublayer with its
projections, we serve zeros in place of the attention's output and save its reading and its KV
cache only.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch.nn.functional import cosine_similarity


class LayerSimilarity:
    """Measures one pass of a model; use as a context manager around it.

    Attributes:
        by_layer: S of each layer.
    """

    def __init__(self, model: Any) -> None:
        self.by_layer: list[float] = []
        self._model = model
        self._input = torch.empty(0)
        self._handles: list[Any] = []

    def __enter__(self) -> LayerSimilarity:
        def before(module: Any, args: Any, kwargs: Any) -> None:
            self._input = (args[0] if args else kwargs["hidden_states"])[0]

        def after(module: Any, args: Any, output: Any) -> None:
            similarity = cosine_similarity(self._input, self._input + output[0][0], dim=-1)
            self.by_layer.append(float(1 - similarity.mean()))

        for layer in self._model.model.layers:
            self._handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
            self._handles.append(layer.self_attn.register_forward_hook(after))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()


def least_important(similarity: list[float], protected: Collection[int], count: int) -> list[int]:
    """The layers of least S, ascending.

    Args:
        similarity: S of each layer.
        protected: layers that stay.
        count: how many.

    Raises:
        ValueError: fewer than ``count`` layers may go.
    """
    free = [layer for layer in range(len(similarity)) if layer not in protected]
    if count > len(free):
        raise ValueError(
            f"{count} layers cannot go: {len(free)} of {len(similarity)} are neither anchors nor "
            "dense ones"
        )
    return sorted(sorted(free, key=lambda layer: similarity[layer])[:count])
