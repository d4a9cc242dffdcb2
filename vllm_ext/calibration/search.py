"""From measured reuse errors to a schedule that is proven end to end.

1. *Errors* of every layer under every earlier layer's selection (``reuse_error``).
2. *Dynamic programming* over the layers for the sets of ``n`` anchors of least total error.
3. *Verification*: the best sets, then single-anchor moves from the winner, are judged by the
   KL divergence of their next-token distributions from dense ones under forced decoding. The
   proxy alone is not trusted.
4. *Held-out prompts*, which chose nothing, give the figures that the profile states.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from attn_backends.findings import Findings
from attn_backends.plan import CHOOSING_ROLES, LayerRole, LayerSchedule
from vllm_ext.calibration.data import Example
from vllm_ext.calibration.layer_similarity import LayerSimilarity
from vllm_ext.calibration.probe import Probe
from vllm_ext.calibration.reuse_error import ReuseErrors, spread_positions
from vllm_ext.calibration.sinks import PromptSinks, SinkMeasure, off_reason, summarize

SAMPLED_POSITIONS = 24  # of a text; of a retrieval prompt, question and answer


@dataclass
class Recording:
    """What one dense pass over an example leaves behind."""

    example: Example
    logprobs: torch.Tensor  # [forced_tokens, vocabulary], dense
    cache: Any  # KV cache of the prompt without the forced tokens
    errors: torch.Tensor  # [layer a, layer b, head of a, head of b], see ReuseErrors.matrix
    similarity: list[float]  # by layer, see LayerSimilarity
    sinks: PromptSinks | None  # None where the model has no need of them


@dataclass(frozen=True)
class Verdict:
    """Fidelity of a schedule against dense under forced decoding."""

    anchors: tuple[int, ...]
    kl_text: float
    kl_retrieval: float
    agreement_text: float  # top-1, over the forced steps
    agreement_retrieval: float

    @property
    def loss(self) -> float:
        """What the search minimises: both kinds of prompt count the same."""
        return (self.kl_text + self.kl_retrieval) / 2


@torch.no_grad()
def record(model: Any, probe: Probe, example: Example) -> Recording:
    """One dense pass: reference logits, reuse errors, similarities, sinks, KV cache."""
    from transformers import DynamicCache

    num_tokens = len(example.ids) - 1  # the last one is only predicted
    forced = torch.arange(num_tokens - example.forced_tokens, num_tokens)
    is_text = example.kind == "text"  # of retrieval, only the end looks far back for sure
    positions = spread_positions(num_tokens, SAMPLED_POSITIONS) if is_text else forced
    probe.schedule = None
    cache = DynamicCache()
    ids = torch.tensor([example.ids[:-1]], device=model.device)
    with ExitStack() as stack:
        errors = stack.enter_context(ReuseErrors(model, probe, positions.to(model.device)))
        similarity = stack.enter_context(LayerSimilarity(model))
        looks = not off_reason(model)
        sinks = stack.enter_context(SinkMeasure(model, probe, num_tokens)) if looks else None
        hidden = model.model(
            input_ids=ids, past_key_values=cache, use_cache=True
        ).last_hidden_state[0, forced]
    logprobs = model.lm_head(hidden).log_softmax(-1)
    cache.crop(-example.forced_tokens)
    return Recording(
        example,
        logprobs,
        cache,
        errors.matrix(),
        similarity.by_layer,
        None if sinks is None else sinks.result(),
    )


def findings(model: Any, recordings: list[Recording]) -> Findings:
    """Sinks and similarities over all prompts."""
    measured = [r.sinks for r in recordings if r.sinks is not None]
    similarity = torch.tensor([r.similarity for r in recordings]).mean(0)
    return Findings(
        sinks=summarize(measured) if measured else None,
        sinks_off_reason=off_reason(model),
        layer_similarity=[round(value, 5) for value in similarity.tolist()],
    )


def mean_errors(recordings: list[Recording]) -> torch.Tensor:
    """``ReuseErrors.matrix`` averaged over the prompts, both kinds counting the same."""
    kinds = sorted({recording.example.kind for recording in recordings})
    means = [
        torch.stack([r.errors for r in recordings if r.example.kind == kind]).mean(0)
        for kind in kinds
    ]
    return torch.stack(means).mean(0)


def layer_errors(errors: torch.Tensor) -> torch.Tensor:
    """``[layer a, layer b]``: every head of ``b`` follows its best head of ``a``."""
    return errors.amin(2).sum(2)


def best_anchor_sets(
    costs: torch.Tensor, num_anchors: int, first_layer: int, num_sets: int
) -> list[tuple[int, ...]]:
    """Anchor sets of least total error, best first.

    Args:
        costs: ``[num_layers a, num_layers b]``, of ``b`` reading ``a``'s selection; anchors
            attend their own.
        num_anchors: anchors in a set; the first is ``first_layer``.
        first_layer: the first layer that is not dense.
        num_sets: how many to return.
    """
    num_layers = costs.shape[0]

    def span(anchor: int, end: int) -> float:
        return float(costs[anchor, anchor:end].sum())

    # best[m][j]: sets of m anchors that cover [first_layer, j), with their cost.
    best: list[dict[int, list[tuple[float, tuple[int, ...]]]]] = [{first_layer: [(0.0, ())]}]
    for _ in range(num_anchors):
        level: dict[int, list[tuple[float, tuple[int, ...]]]] = {}
        for start, entries in best[-1].items():
            for end in range(start + 1, num_layers + 1):
                cost = span(start, end)
                level.setdefault(end, []).extend((v + cost, (*s, start)) for v, s in entries)
        best.append({end: sorted(e)[:num_sets] for end, e in level.items()})
    return [anchors for _, anchors in best[-1].get(num_layers, [])]


def make_schedule(
    anchors: tuple[int, ...], errors: torch.Tensor, first_layer: int
) -> LayerSchedule:
    """Roles and head maps for a set of anchors.

    Args:
        anchors: layer indices, ascending.
        errors: ``[a, b, head of a, head of b]``.
        first_layer: layers before it are dense.
    """
    num_layers, identity = errors.shape[0], tuple(range(errors.shape[2]))
    roles, head_maps, anchor = [], {}, first_layer
    for layer in range(num_layers):
        if layer < first_layer:
            roles.append(LayerRole.DENSE)
        elif layer in anchors:
            roles.append(LayerRole.ANCHOR)
            anchor = layer
        else:
            roles.append(LayerRole.REUSE)
            heads = tuple(errors[anchor, layer].argmin(0).tolist())
            if heads != identity:
                head_maps[layer] = heads
    return LayerSchedule(tuple(roles), head_maps)


def without_layers(schedule: LayerSchedule, dropped: Collection[int]) -> LayerSchedule:
    """The schedule with some layers dropped; none of them may be an anchor."""
    roles = tuple(
        LayerRole.DROP if layer in dropped else role for layer, role in enumerate(schedule.roles)
    )
    head_maps = {
        layer: heads for layer, heads in schedule.head_maps.items() if layer not in dropped
    }
    return LayerSchedule(roles, head_maps)


@torch.no_grad()
def verify(
    model: Any, probe: Probe, schedule: LayerSchedule, recordings: list[Recording]
) -> Verdict:
    """Forced decoding of every example's last tokens under a schedule.

    Prompts are dense and their recorded KV cache serves, unless the schedule drops layers: those
    are dropped in a prompt too, which is then read again.
    """
    divergences: dict[str, list[torch.Tensor]] = {"text": [], "retrieval": []}
    agreements: dict[str, list[torch.Tensor]] = {"text": [], "retrieval": []}
    probe.schedule = schedule
    for recording in recordings:
        example = recording.example
        ids = torch.tensor([example.ids[-example.forced_tokens - 1 : -1]], device=model.device)
        cache = _read_again(model, example) if schedule.dropped else recording.cache
        hidden = model.model(input_ids=ids, past_key_values=cache, use_cache=True)
        hidden = hidden.last_hidden_state[0]
        cache.crop(-example.forced_tokens)
        dense, sparse = recording.logprobs, model.lm_head(hidden).log_softmax(-1)
        divergences[example.kind].append((dense.exp() * (dense - sparse)).sum(-1))
        agreements[example.kind].append((dense.argmax(-1) == sparse.argmax(-1)).float())
    probe.schedule = None
    anchors = tuple(i for i, role in enumerate(schedule.roles) if role in CHOOSING_ROLES)

    def mean(values: list[torch.Tensor]) -> float:
        return round(float(torch.cat(values).mean()), 6) if values else 0.0

    return Verdict(
        anchors,
        mean(divergences["text"]),
        mean(divergences["retrieval"]),
        mean(agreements["text"]),
        mean(agreements["retrieval"]),
    )


def _read_again(model: Any, example: Example) -> Any:
    """KV cache of the prompt without the forced tokens, under the probe's schedule."""
    from transformers import DynamicCache

    cache = DynamicCache()
    ids = torch.tensor([example.ids[: -example.forced_tokens - 1]], device=model.device)
    model.model(input_ids=ids, past_key_values=cache, use_cache=True)
    return cache


def search(
    candidates: list[tuple[int, ...]],
    num_layers: int,
    judge: Callable[[tuple[int, ...]], Verdict],
    max_verifications: int,
) -> tuple[Verdict, list[Verdict]]:
    """Judges candidates, then moves single anchors of the best while that helps, each time from
    the best so far.

    Args:
        candidates: anchor sets from the proxy.
        num_layers: of the model.
        judge: end-to-end verdict on a set.
        max_verifications: bound on the sets that are judged.

    Returns:
        The best verdict and all verdicts.
    """
    seen: dict[tuple[int, ...], Verdict] = {}

    def look_at(anchors: tuple[int, ...]) -> None:
        if anchors not in seen and len(seen) < max_verifications:
            seen[anchors] = judge(anchors)

    for anchors in candidates:
        look_at(anchors)
    best = min(seen.values(), key=lambda v: v.loss)
    moves = list(itertools.product(range(1, len(best.anchors)), (-1, 1, -2, 2)))
    since_better = 0  # moves in a row that did not help
    for index, shift in itertools.cycle(moves):
        if since_better == len(moves) or len(seen) == max_verifications:
            break
        since_better += 1
        moved = list(best.anchors)
        moved[index] += shift
        if moved == sorted(set(moved)) and moved[-1] < num_layers:
            look_at(tuple(moved))
            if seen[tuple(moved)].loss < best.loss:
                best, since_better = seen[tuple(moved)], 0
    return best, list(seen.values())
