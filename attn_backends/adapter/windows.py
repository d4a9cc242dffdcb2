"""Plans of layers that have a window of their own, whatever the method does in the others."""

from __future__ import annotations

from dataclasses import replace

import torch

from attn_backends.method import Geometry
from attn_backends.methods.sink_window import SinkWindowConfig, SinkWindowSelector
from attn_backends.plan import DecodePlan, Window


class WindowPlans:
    """Derives, from a step's plan, those of the layers with a window.

    Args:
        windows: of the builder's layers, by the engine's layer name.
        geometry: of the builder's layers.
        device: of the selections.

    Raises:
        ConfigError: a window is smaller than a KV block.
    """

    def __init__(
        self, windows: dict[str, Window], geometry: Geometry, device: torch.device
    ) -> None:
        self._windows = windows
        self._selectors = {
            window: SinkWindowSelector(
                SinkWindowConfig(
                    sink_tokens=window.sink_tokens, window_tokens=window.window_tokens
                ),
                geometry,
                device,
            )
            for window in set(windows.values())
        }

    def of_step(self, plan: DecodePlan) -> dict[str, DecodePlan]:
        """By layer name: the same rows, each through the layer's window, in prefill as well."""
        plans = {window: self._windowed(plan, own) for window, own in self._selectors.items()}
        return {name: plans[window] for name, window in self._windows.items()}

    def _windowed(self, plan: DecodePlan, selector: SinkWindowSelector) -> DecodePlan:
        decode, prefill = plan.decode, plan.prefill
        return replace(
            plan,
            selection=None if decode is None else selector.select(decode),
            anchor=None,
            decode_rule=None if decode is None else selector.span_rule(decode.num_reqs),
            prefill_rule=None if prefill is None else selector.span_rule(prefill.num_reqs),
            decodes_densely=False,  # what is outside the window may be freed
        )
