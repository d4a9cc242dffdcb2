"""From recorded attention mass to a schedule that is proven end to end.

1. *Similarity* (Kascade, arXiv 2512.16391): how much of what layer ``b`` would select for
   itself does the selection of layer ``a`` recover, per pair of KV heads; the minimum over the
   positions of a prompt, the mean over prompts.
2. *Importance*: how much attention changes a layer's residual stream, ``1 - cos(x, x + attn)``.
3. *Dynamic programming* over the layers for the best ``n`` anchors under that proxy.
4. *Verification*: the best sets, then single-anchor moves around the winner, are judged by the
   KL divergence of their next-token distributions from dense ones under forced decoding. The
   proxy alone is not trusted: it does not see how errors add up.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from attn_backends.plan import LayerRole, LayerSchedule
from vllm_ext.calibration.data import FORCED_TOKENS, Example
from vllm_ext.calibration.probe import Probe, select_blocks

SAMPLED_POSITIONS = 24  # per prompt; the forced tokens are always among them


@dataclass
class Recording:
    """What one dense pass over an example leaves behind."""

    example: Example
    logprobs: torch.Tensor  # [FORCED_TOKENS, vocabulary], dense
    cache: Any  # KV cache of the prompt without the forced tokens
    mass: torch.Tensor  # [num_layers, num_positions, num_kv_heads, num_blocks]
    positions: torch.Tensor
    importance: torch.Tensor  # [num_layers]


@dataclass(frozen=True)
class Verdict:
    """Fidelity of a schedule against dense under forced decoding."""

    anchors: tuple[int, ...]
    kl_text: float
    kl_retrieval: float
    agreement: float  # top-1, over all forced steps

    @property
    def loss(self) -> float:
        """What the search minimises: both kinds of text count the same."""
        return (self.kl_text + self.kl_retrieval) / 2


def _importance_hooks(model: Any, into: dict[int, torch.Tensor]) -> list[Any]:
    handles = []
    for layer in model.model.layers:
        inputs: dict[str, torch.Tensor] = {}

        def before(module: Any, args: Any, kwargs: Any, inputs: Any = inputs) -> None:
            inputs["x"] = args[0] if args else kwargs["hidden_states"]

        def after(module: Any, args: Any, output: Any, inputs: Any = inputs) -> None:
            x, y = inputs["x"], inputs["x"] + output[0]
            cosine = torch.nn.functional.cosine_similarity(x, y, dim=-1)
            into[module.layer_idx] = 1 - cosine.mean()

        handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(layer.self_attn.register_forward_hook(after))
    return handles


@torch.no_grad()
def record(model: Any, probe: Probe, example: Example) -> Recording:
    """One dense pass: reference logits, attention mass, importance, KV cache."""
    from transformers import DynamicCache

    num_tokens = len(example.ids)
    forced = torch.arange(num_tokens - FORCED_TOKENS - 1, num_tokens - 1)
    spread = torch.linspace(num_tokens // 2, num_tokens - FORCED_TOKENS - 2, SAMPLED_POSITIONS)
    if example.kind == "retrieval":  # only the question and its answer look far back
        spread = spread[:0]
    probe.schedule = None
    probe.positions = torch.cat([spread.long(), forced])
    importance: dict[int, torch.Tensor] = {}
    handles = _importance_hooks(model, importance)
    cache = DynamicCache()
    hidden = model.model(
        input_ids=torch.tensor([example.ids[:-1]]), past_key_values=cache, use_cache=True
    ).last_hidden_state[0, forced]
    for handle in handles:
        handle.remove()
    logprobs = model.lm_head(hidden).log_softmax(-1)
    cache.crop(num_tokens - FORCED_TOKENS - 1)
    recording = Recording(
        example=example,
        logprobs=logprobs,
        cache=cache,
        mass=torch.stack([probe.mass[layer] for layer in sorted(probe.mass)]),
        positions=probe.positions,
        importance=torch.stack([importance[layer] for layer in sorted(importance)]),
    )
    probe.positions, probe.mass = None, {}
    return recording


def similarity(recording: Recording, probe: Probe) -> torch.Tensor:
    """Recovered mass of one example.

    Returns:
        ``[num_layers a, num_layers b, num_kv_heads of a, num_kv_heads of b]``, the minimum over
        positions of (mass of ``b`` under ``a``'s selection) / (under its own).
    """
    mass = recording.mass  # [L, P, H, B]
    num_layers, num_positions, num_heads, num_blocks = mass.shape
    seq_lens = (recording.positions + 1).tolist()
    chosen = torch.zeros_like(mass)
    for layer in range(num_layers):
        selection = select_blocks(mass[layer], seq_lens, probe.budget)
        index = selection.logical_blocks.long()
        padded = torch.zeros(num_positions, num_heads, num_blocks + 1)
        padded.scatter_(2, torch.where(index < 0, num_blocks, index), 1.0)
        chosen[layer] = padded[..., :num_blocks]
    own = (mass * chosen).sum(-1)  # [L, P, H]
    recovered = torch.einsum("apin,bpjn->pabij", chosen, mass)
    return (recovered / own.permute(1, 0, 2)[:, None, :, None, :].clamp_min(1e-9)).amin(0)


def best_anchor_sets(
    scores: torch.Tensor, num_anchors: int, first_layer: int, num_sets: int
) -> list[tuple[int, ...]]:
    """Anchor sets of greatest total similarity, best first.

    Args:
        scores: ``[num_layers a, num_layers b]``, importance-weighted.
        num_anchors: anchors in a set; the first is ``first_layer``.
        first_layer: the first layer that is not dense.
        num_sets: how many to return.
    """
    num_layers = scores.shape[0]
    cumulative = scores.cumsum(1)

    def span(anchor: int, end: int) -> float:
        return float(cumulative[anchor, end - 1] - cumulative[anchor, anchor])

    # best[m][j]: sets of m anchors that cover [first_layer, j), with their value.
    best: list[dict[int, list[tuple[float, tuple[int, ...]]]]] = [{first_layer: [(0.0, ())]}]
    for _ in range(num_anchors):
        level: dict[int, list[tuple[float, tuple[int, ...]]]] = {}
        for start, entries in best[-1].items():
            for end in range(start + 1, num_layers + 1):
                gain = span(start, end)
                level.setdefault(end, []).extend((v + gain, (*s, start)) for v, s in entries)
        best.append({end: sorted(e, reverse=True)[:num_sets] for end, e in level.items()})
    return [anchors for _, anchors in best[-1][num_layers]]


def make_schedule(
    anchors: tuple[int, ...], pair_scores: torch.Tensor, first_layer: int
) -> LayerSchedule:
    """Roles and head maps for a set of anchors.

    Args:
        anchors: layer indices, ascending.
        pair_scores: ``[a, b, head of a, head of b]`` mean similarity.
        first_layer: layers before it are dense.
    """
    num_layers, identity = pair_scores.shape[0], tuple(range(pair_scores.shape[2]))
    roles, head_maps, anchor = [], {}, first_layer
    for layer in range(num_layers):
        if layer < first_layer:
            roles.append(LayerRole.DENSE)
        elif layer in anchors:
            roles.append(LayerRole.ANCHOR)
            anchor = layer
        else:
            roles.append(LayerRole.REUSE)
            heads = tuple(pair_scores[anchor, layer].argmax(0).tolist())
            if heads != identity:
                head_maps[layer] = heads
    return LayerSchedule(tuple(roles), head_maps)


@torch.no_grad()
def verify(
    model: Any, probe: Probe, schedule: LayerSchedule, recordings: list[Recording]
) -> Verdict:
    """Forced decoding of every example's last tokens under a schedule."""
    divergences: dict[str, list[float]] = {"text": [], "retrieval": []}
    agreements = []
    probe.schedule = schedule
    for recording in recordings:
        ids = recording.example.ids
        start = len(ids) - FORCED_TOKENS - 1
        for step in range(FORCED_TOKENS):
            logits = model(
                input_ids=torch.tensor([[ids[start + step]]]),
                past_key_values=recording.cache,
                use_cache=True,
            ).logits[0, -1]
            dense, sparse = recording.logprobs[step], logits.log_softmax(-1)
            kl = float((dense.exp() * (dense - sparse)).sum())
            divergences[recording.example.kind].append(kl)
            agreements.append(float(dense.argmax() == sparse.argmax()))
        recording.cache.crop(start)
    probe.schedule = None
    anchors = tuple(i for i, role in enumerate(schedule.roles) if role is LayerRole.ANCHOR)
    means = {kind: sum(v) / max(len(v), 1) for kind, v in divergences.items()}
    agreement = sum(agreements) / len(agreements)
    return Verdict(anchors, means["text"], means["retrieval"], agreement)


def search(
    candidates: list[tuple[int, ...]],
    num_layers: int,
    judge: Callable[[tuple[int, ...]], Verdict],
    max_verifications: int,
    echo: Callable[[str], None],
) -> tuple[Verdict, list[Verdict]]:
    """Judges candidates, then moves single anchors of the best while that helps.

    Args:
        candidates: anchor sets from the proxy.
        num_layers: of the model.
        judge: end-to-end verdict on a set.
        max_verifications: bound on the calls of ``judge``.
        echo: progress lines.

    Returns:
        The best verdict and all verdicts.
    """
    seen: dict[tuple[int, ...], Verdict] = {}

    def look_at(anchors: tuple[int, ...]) -> None:
        if anchors not in seen and len(seen) < max_verifications:
            seen[anchors] = verdict = judge(anchors)
            echo(
                f"{len(seen)}/{max_verifications} anchors {list(anchors)}: KL text "
                f"{verdict.kl_text:.4f}, retrieval {verdict.kl_retrieval:.4f}, "
                f"top-1 {verdict.agreement:.3f}"
            )

    for anchors in candidates:
        look_at(anchors)
    best = min(seen.values(), key=lambda v: v.loss)
    while len(seen) < max_verifications:
        for index, shift in itertools.product(range(1, len(best.anchors)), (-1, 1, -2, 2)):
            moved = list(best.anchors)
            moved[index] += shift
            if moved == sorted(set(moved)) and moved[-1] < num_layers:
                look_at(tuple(moved))
        winner = min(seen.values(), key=lambda v: v.loss)
        if winner is best:
            break
        best = winner
    return best, list(seen.values())
