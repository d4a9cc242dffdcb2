"""What a calibration measured about a checkpoint besides its anchors; part of a profile.

Nothing here changes what the engine does: the figures are for the choice of ``sink_tokens`` and
``drop_layers``. How they are measured: ``vllm_ext.calibration.sinks`` and ``layer_similarity``.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Share = Annotated[float, Field(ge=0, le=1.0001)]  # 1 may be exceeded by rounding


class SecondarySink(BaseModel):
    """A token whose hidden state turns into a copy of the first token's for some layers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: int = Field(ge=0)
    position: int = Field(ge=1)
    first_layer: int = Field(ge=0)
    last_layer: int = Field(ge=0)
    kind: Literal["secondary", "bos"]  # "bos": it lives about as long as the first token does
    attention: Share  # from a query that can see it, mean over the heads of those layers


class SinkFindings(BaseModel):
    """Attention sinks; layers, heads and positions are 0-based."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epsilon: float = Field(gt=0, lt=1)
    span_tokens: int = Field(ge=1)  # the first tokens, over which ``sink_rate`` is taken
    prompts: int = Field(ge=1)
    sink_rate: list[Share]  # by position: share of query heads that pay it more than epsilon
    needed_tokens: int = Field(ge=0)  # first tokens up to the last sink of most prompts
    first_mass: dict[int, Share]  # what late queries pay the first n tokens, mean over heads
    secondary_per_prompt: float = Field(ge=0)
    secondary_mass: Share  # what late queries pay all of them, in the layers that have any
    secondary: list[SecondarySink]  # those that get most attention
    head_sink_mass: list[list[Share]]  # by layer and KV head: mass on the first tokens needed
    head_value_ratio: list[list[float]]  # norm of the first token's value over the mean norm
    dormant_heads: list[tuple[int, int]]  # layer and KV head


class Findings(BaseModel):
    """Sinks and layer similarities."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sinks: SinkFindings | None
    sinks_off_reason: str = Field(default="", max_length=300)  # why there are none
    layer_similarity: list[float]  # S = 1 - cos(X, X + Attn(LN(X))) of each layer

    @model_validator(mode="after")
    def _sinks_or_a_reason(self) -> Findings:
        if (self.sinks is None) != bool(self.sinks_off_reason):
            raise ValueError("give sinks, or sinks_off_reason where they were not looked for")
        return self

    def require_shape(self, num_layers: int, num_kv_heads: int) -> None:
        """Refuses findings about another model.

        Raises:
            ValueError: names the field.
        """
        if len(self.layer_similarity) != num_layers:
            raise ValueError(
                f"findings.layer_similarity has {len(self.layer_similarity)} layers of {num_layers}"
            )
        if self.sinks is None:
            return
        for field in ("head_sink_mass", "head_value_ratio"):
            shape = [len(heads) for heads in getattr(self.sinks, field)]
            if shape != [num_kv_heads] * num_layers:
                raise ValueError(
                    f"findings.sinks.{field} is not {num_layers} layers of {num_kv_heads} KV heads"
                )
