"""What a policy makes of a model's layers: roles, head maps, windows and retention."""

from __future__ import annotations

from dataclasses import dataclass

from attn_backends.config import block_problem
from attn_backends.plan import LayerRole, LayerSchedule
from attn_backends.policy.model import Policy, PolicyError
from kvcache.retention import RetentionPolicy, SpanRetention


@dataclass(frozen=True)
class Composition:
    """A schedule under a policy.

    Attributes:
        schedule: what the engine does.
        unmapped_layers: REUSE layers that follow another anchor than the base schedule has them
            follow: no calibrated head map applies, each KV head follows the anchor's same one.
    """

    schedule: LayerSchedule
    unmapped_layers: tuple[int, ...]


def compose(policy: Policy, base: LayerSchedule, block_size: int, num_kv_heads: int) -> Composition:
    """Puts the policy's roles in place of the base schedule's.

    Args:
        policy: its settings are not looked at.
        base: of the model, usually from a profile.
        block_size: of the KV cache, tokens.
        num_kv_heads: of each layer.

    Raises:
        PolicyError: a layer the model does not have, a layer that reuses what no anchor before
            it selects, or a window smaller than a KV block.
    """
    owners = _owners(policy, len(base.roles))
    rules = {layer: policy.layers[index] for layer, index in owners.items()}
    roles = tuple(
        rules[layer].role if layer in rules else role for layer, role in enumerate(base.roles)
    )
    _require_anchors(owners, base.roles, roles)
    for index, rule in enumerate(policy.layers):
        if rule.span is None:
            continue
        if problem := block_problem(rule.span.floor_tokens, block_size):
            raise PolicyError(("layers", index, "window_tokens"), problem)
    before, after = _anchors(base.roles), _anchors(roles)
    reusing = [layer for layer, role in enumerate(roles) if role is LayerRole.REUSE]
    follows_as_before = [
        layer
        for layer in reusing
        if base.roles[layer] is LayerRole.REUSE and before[layer] == after[layer]
    ]
    spans = {
        layer: (rule.span,) * num_kv_heads for layer, rule in rules.items() if rule.span is not None
    }
    head_maps = {
        layer: base.head_maps[layer] for layer in follows_as_before if layer in base.head_maps
    }
    unmapped = tuple(sorted(set(reusing) - set(follows_as_before))) if base.head_maps else ()
    return Composition(LayerSchedule(roles, head_maps, spans), unmapped)


def retention_of(policy: Policy, base: tuple[RetentionPolicy, ...]) -> tuple[RetentionPolicy, ...]:
    """The base retention, except where the policy's layers free what is outside their window.

    Args:
        policy: of a model with as many layers as ``base``.
        base: of each layer.

    Raises:
        PolicyError: a layer the model does not have.
    """
    owners = _owners(policy, len(base))
    retained = list(base)
    for layer, index in owners.items():
        rule = policy.layers[index]
        if rule.frees and rule.span is not None:
            # What a window layer writes for a generated token comes from hidden states that the
            # sparse layers before it made: it serves other prompts no more than theirs does.
            retained[layer] = SpanRetention(rule.span, base[layer].caches_generated)
    return tuple(retained)


def _owners(policy: Policy, num_layers: int) -> dict[int, int]:
    """Which entry of ``policy.layers`` a layer has its role from."""
    for index, rule in enumerate(policy.layers):
        if rule.layers[-1] >= num_layers:
            raise PolicyError(
                ("layers", index, "layers"),
                f"has layer {rule.layers[-1]}; this model has layers 0 to {num_layers - 1}",
            )
    return {layer: index for index, rule in enumerate(policy.layers) for layer in rule.layers}


def _anchors(roles: tuple[LayerRole, ...]) -> list[int | None]:
    """The last anchor before each layer."""
    last: int | None = None
    found: list[int | None] = []
    for layer, role in enumerate(roles):
        found.append(last)
        if role is LayerRole.ANCHOR:
            last = layer
    return found


def _require_anchors(
    owners: dict[int, int], base: tuple[LayerRole, ...], roles: tuple[LayerRole, ...]
) -> None:
    for layer, anchor in enumerate(_anchors(roles)):
        if roles[layer] is not LayerRole.REUSE or anchor is not None:
            continue
        if layer in owners:
            raise PolicyError(
                ("layers", owners[layer], "role"),
                f"is reuse, but no anchor is before layer {layer}; make an earlier layer an "
                f"anchor, or layer {layer} dense",
            )
        # The base schedule is sound, so entries must have taken all its anchors away.
        lost = _anchors(base)[layer]
        assert lost is not None
        raise PolicyError(
            ("layers", owners[lost], "role"),
            f"takes away the anchor {lost} whose selection layer {layer} reuses, and no other "
            f"anchor is before layer {layer}; keep it, or give layer {layer} another role",
        )
