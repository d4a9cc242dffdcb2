"""Attention sinks of a checkpoint: found, not assumed.

- *Primary sinks* (When Attention Sink Emerges, arXiv 2410.10781): the importance of token ``k`` is
  ``alpha_k``, the mean attention that the queries ``k .. T - 1`` pay it, T = 64; a head has a sink
  at ``k`` where ``alpha_k`` exceeds 0.3. Near T few queries are left to average over, so only the
  first 16 positions are looked at.
- *Secondary sinks* (arXiv 2512.22213): tokens whose hidden state points where the first token's
  does (cosine beyond 0.9, either sign) for more than 4 layers. They lie anywhere in a prompt, so
  that keeping first tokens does not keep them. We differ: the paper looks between the layers
  where the first token's norm rises and falls most; the demo model has two such stretches, and
  its secondary sinks are in the other one (docs/sinks.md), so we look in all layers.
- *Dormant heads* (active-dormant heads, arXiv 2410.13835): nearly all mass on sinks whose values
  are small: such a head adds nothing. The paper's code has no thresholds; those here are ours.

Models with gated attention or learned sinks have no need of token sinks: nothing is measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cosine_similarity

from attn_backends.findings import SecondarySink, SinkFindings
from vllm_ext.calibration.probe import LayerPass, PassObserver, Probe, block_weights
from vllm_ext.calibration.reuse_error import spread_positions

EPSILON = 0.3
SPAN_TOKENS = 64
_LOOKED_AT = 16  # first positions
_FIRST = (1, 2, 4, 8, 16, 32, 64)  # numbers of first tokens whose mass is shown
_LATE_QUERIES = 24  # sampled from the second half of a prompt
SINK_SHARE = 0.01  # of all heads: fewer are not worth keeping a token for
COSINE = 0.9
_MIN_LIFE, _SHORT_OF_BOS = 4, 15  # layers; the paper's
DORMANT_MASS, DORMANT_VALUE_RATIO = 0.9, 0.5
_SHOWN = 32  # secondary sinks in a profile


def off_reason(model: Any) -> str:
    """Why sinks of this model need no looking for, or an empty string."""
    attention = model.model.layers[0].self_attn
    if getattr(attention, "sinks", None) is not None:
        return "the model has learned sinks"
    config = model.config
    head_size = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    query_features = getattr(getattr(attention, "q_proj", None), "out_features", 0)
    is_gated = query_features == 2 * config.num_attention_heads * head_size or any(
        hasattr(attention, name) for name in ("gate_proj", "g_proj", "attn_gate")
    )
    return "the model gates its attention outputs" if is_gated else ""


@dataclass
class PromptSinks:
    """What one prompt shows; by layer where not said otherwise."""

    alpha: torch.Tensor  # [layers, query heads, first positions]: importance
    first_mass: torch.Tensor  # [layers, query heads, len(_FIRST)], from late queries
    attention: torch.Tensor  # [layers, seq_len]: from late queries that see the token, all heads
    value_ratio: torch.Tensor  # [layers, kv heads]
    cosine: torch.Tensor  # [layers, seq_len], of layer inputs with the first token's


class SinkMeasure(PassObserver):
    """Measures one prefill of a probed model; use as a context manager around it."""

    def __init__(self, model: Any, probe: Probe, num_tokens: int) -> None:
        super().__init__(model, probe)
        self._positions = spread_positions(num_tokens, _LATE_QUERIES).to(model.device)
        self._rows: dict[str, list[torch.Tensor]] = {}

    def result(self) -> PromptSinks:
        """After the pass."""
        return PromptSinks(**{name: torch.stack(rows).cpu() for name, rows in self._rows.items()})

    def _keep(self, **measured: torch.Tensor) -> None:
        for name, value in measured.items():
            self._rows.setdefault(name, []).append(value)

    def before_layer(self, hidden: torch.Tensor) -> None:
        """See ``PassObserver``."""
        self._keep(cosine=cosine_similarity(hidden, hidden[0], dim=-1))

    def observe(self, seen: LayerPass) -> None:
        """See ``PassObserver``."""
        query, key, scale = seen.query, seen.key, seen.scale
        seq_len = key.shape[1]
        span = torch.arange(min(SPAN_TOKENS, seq_len), device=key.device)
        early = _attention(query[:, span], key[:, span], span, scale)
        alpha = early.sum(1) / (len(span) - span)
        late = _attention(query[:, self._positions], key, self._positions, scale)
        tokens = torch.arange(seq_len, device=key.device)
        num_seeing = (self._positions[:, None] >= tokens).sum(0).clamp_min(1)
        masses = late.mean(1).cumsum(-1)
        norms = seen.value.norm(dim=-1)
        self._keep(
            alpha=alpha[:, :_LOOKED_AT],
            first_mass=masses[:, [min(n, seq_len) - 1 for n in _FIRST]],
            attention=(late.sum(1) / num_seeing).mean(0),
            value_ratio=norms[:, 0] / norms.mean(1),
        )


def _attention(
    query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention weights ``[num_query_heads, num_positions, num_keys]``."""
    return block_weights(query, key, positions, scale, 1).squeeze(-1).flatten(0, 1)


def summarize(prompts: list[PromptSinks]) -> SinkFindings:
    """Findings over all prompts of a calibration; they must have ``SPAN_TOKENS`` or more."""
    rates = torch.stack([(p.alpha > EPSILON).float().mean((0, 1)) for p in prompts])
    # In most prompts: what attracts a few heads in one is its content, not its position.
    sinks = ((rates >= SINK_SHARE).float().mean(0) > 0.5).nonzero().flatten().tolist()
    needed_tokens = sinks[-1] + 1 if sinks else 0
    mass = torch.stack([p.first_mass for p in prompts]).mean(0)  # [layers, heads, len(_FIRST)]
    value_ratio = torch.stack([p.value_ratio for p in prompts]).mean(0)
    shown = next(index for index, n in enumerate(_FIRST) if n >= needed_tokens)
    head_mass = mass[..., shown].reshape(*value_ratio.shape, -1).mean(2)
    dormant = (head_mass > DORMANT_MASS) & (value_ratio < DORMANT_VALUE_RATIO)
    found = [sink for number, p in enumerate(prompts) for sink in secondary_sinks(number, p)]
    found.sort(key=lambda sink: -sink.attention)
    return SinkFindings(
        epsilon=EPSILON,
        span_tokens=SPAN_TOKENS,
        prompts=len(prompts),
        sink_rate=_rounded(rates.mean(0)),
        needed_tokens=needed_tokens,
        first_mass=dict(zip(_FIRST, _rounded(mass.mean((0, 1))), strict=True)),
        secondary_per_prompt=round(len(found) / len(prompts), 2),
        secondary_mass=round(sum(map(secondary_mass, prompts)) / len(prompts), 4),
        secondary=found[:_SHOWN],
        head_sink_mass=[_rounded(heads) for heads in head_mass],
        head_value_ratio=[_rounded(heads) for heads in value_ratio],
        dormant_heads=[(layer, head) for layer, head in dormant.nonzero().tolist()],
    )


def _follows_first(prompt: PromptSinks) -> torch.Tensor:
    """Where a token is a secondary sink: ``[layers, seq_len]`` bool."""
    alike = prompt.cosine.abs() > COSINE
    alike[:, 0] = False  # the first token itself
    ever = torch.zeros_like(alike)
    num_layers = len(alike)
    for first in range(num_layers - _MIN_LIFE):  # every run of more than _MIN_LIFE layers
        run = slice(first, first + _MIN_LIFE + 1)
        ever[run] |= alike[run].all(0)
    return ever


def secondary_sinks(number: int, prompt: PromptSinks) -> list[SecondarySink]:
    """Tokens, other than the first, that follow its hidden state for long enough.

    Args:
        number: of the prompt.
        prompt: what was measured.
    """
    follows = _follows_first(prompt)
    found = []
    for position in follows.any(0).nonzero().flatten().tolist():
        layers = follows[:, position].nonzero().flatten()
        is_short = len(layers) < len(follows) - _SHORT_OF_BOS
        found.append(
            SecondarySink(
                prompt=number,
                position=position,
                first_layer=int(layers[0]),
                last_layer=int(layers[-1]),
                kind="secondary" if is_short else "bos",
                attention=round(float(prompt.attention[layers, position].mean()), 4),
            )
        )
    return found


def secondary_mass(prompt: PromptSinks) -> float:
    """What a late query pays all secondary sinks together, mean over the layers that have any."""
    follows = _follows_first(prompt)
    layers = follows.any(1)
    if not layers.any():
        return 0.0
    return min(1.0, float((prompt.attention * follows)[layers].sum(1).mean()))


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]
