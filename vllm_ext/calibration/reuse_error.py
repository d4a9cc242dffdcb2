"""What it costs a layer to read the blocks that another layer chose.

For every pair of layers and KV heads, the relative error of the layer's contribution to the
residual stream: the attention output under the other's selection, minus the dense one, through
the output projection, squared, over the squared norm of the residual. Errors of layers add up
along the stream, so their sum over the layers predicts the divergence of the logits.

Kascade (arXiv 2512.16391) ranks anchors by the share of attention mass that a selection
recovers. That proxy does not see the values: on the demo model its best four anchors diverge
three times further from dense than the four found by this error (docs/measurements.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pad

from vllm_ext.calibration.probe import (
    LayerPass,
    PassObserver,
    Probe,
    block_weights,
    chosen_blocks,
    mass_of,
)


class ReuseErrors(PassObserver):
    """Observes one prefill of a probed model; use as a context manager around it.

    Attributes:
        positions: ``[num_positions]`` query tokens that are looked at.
        by_layer: per layer ``b``: ``[num_layers a <= b, num_kv_heads of a, num_kv_heads of b]``.
    """

    def __init__(self, model: Any, probe: Probe, positions: torch.Tensor) -> None:
        super().__init__(model, probe)
        self.positions = positions
        self.by_layer: list[torch.Tensor] = []
        self._residual_power = torch.ones(len(positions))
        self._chosen: list[torch.Tensor] = []  # per layer [num_positions, heads, blocks]

    def before_layer(self, hidden: torch.Tensor) -> None:
        """See ``PassObserver``."""
        self._residual_power = hidden[self.positions].square().sum(-1)

    def matrix(self) -> torch.Tensor:
        """``[num_layers a, num_layers b, num_kv_heads of a, num_kv_heads of b]``, infinite where
        ``a`` comes after ``b``.
        """
        num_layers = len(self.by_layer)
        heads = self.by_layer[0].shape[1:]
        result = torch.full((num_layers, num_layers, *heads), torch.inf)
        for layer, errors in enumerate(self.by_layer):
            result[: layer + 1, layer] = errors
        return result

    def observe(self, seen: LayerPass) -> None:
        """See ``PassObserver``."""
        budget, num_kv_heads = self._probe.budget, seen.key.shape[0]
        asked = seen.query[:, self.positions]
        weights = block_weights(asked, seen.key, self.positions, seen.scale, budget.block_size)
        self._chosen.append(chosen_blocks(mass_of(weights), self.positions, budget).float())
        values = pad(seen.value, (0, 0, 0, -seen.value.shape[1] % budget.block_size))
        values = values.reshape(num_kv_heads, -1, budget.block_size, values.shape[-1])
        # Blocks' shares of the output [heads, group, positions, blocks, head_size] and mass.
        outputs = torch.einsum("hgpnt,hntd->hgpnd", weights, values)
        masses = weights.sum(-1)
        # [hidden, num_kv_heads, group * head_size]
        projection = seen.module.o_proj.weight
        projection = projection.reshape(projection.shape[0], num_kv_heads, -1)
        self.by_layer.append(
            torch.stack(
                [self._error(chosen, outputs, masses, projection) for chosen in self._chosen]
            )
        )

    def _error(
        self,
        chosen: torch.Tensor,
        outputs: torch.Tensor,
        masses: torch.Tensor,
        projection: torch.Tensor,
    ) -> torch.Tensor:
        """``[heads of a, heads of b]`` for one layer's selection, the mean over positions."""
        kept = torch.einsum("pin,hgpnd->pihgd", chosen, outputs)
        share = torch.einsum("pin,hgpn->pihg", chosen, masses)
        dense = outputs.sum(3).permute(2, 0, 1, 3)[:, None]
        missing = (kept / share[..., None].clamp_min(1e-9) - dense).flatten(3)
        projected = torch.einsum("pihx,ohx->piho", missing, projection)
        return (projected.square().sum(-1) / self._residual_power[:, None, None]).mean(0).cpu()


def spread_positions(num_tokens: int, count: int) -> torch.Tensor:
    """``count`` query positions over the second half of a prompt."""
    return torch.linspace(num_tokens // 2, num_tokens - 1, count).long()
