"""MOA's section of a profile, from the plan that its calibration chose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attn_backends.checkpoint import fingerprint, read_model_config
from attn_backends.methods.moa import METHOD as MOA
from attn_backends.methods.moa import HeadSpans
from attn_backends.profile import SCHEMA_VERSION, Profile
from vllm_ext.calibration.assignment import mean_density
from vllm_ext.calibration.plans import Plan
from vllm_ext.calibration.spanned import SpannedModel

if TYPE_CHECKING:
    from vllm_ext.calibration.elastic import ElasticSettings


def profile_of(
    settings: ElasticSettings,
    model: SpannedModel,
    best: Plan,
    plans: Sequence[Plan],
    validated_tokens: int,
) -> Profile:
    """The profile, with how it was found.

    Args:
        settings: of the calibration.
        model: that was calibrated.
        best: the plan that is served.
        plans: all of them, with their verdicts.
        validated_tokens: of the prompts that they were validated on.
    """
    rules, used = settings.rules(), sorted({*best.rules})
    spans = [rules[rule] for rule in used]
    heads = iter(best.rules)
    section = HeadSpans(
        sink_tokens=settings.sink_tokens,
        floor_tokens=settings.floor_tokens,
        classes=[[span.alpha_tokens, span.beta_64ths] for span in spans],
        class_of_head=[
            [used.index(rule) for rule in islice(heads, model.num_kv_heads)]
            for _ in range(model.num_layers)
        ],
    )
    served = [rules[rule] for rule in best.rules]
    lengths = [*settings.lengths_tokens(), validated_tokens]
    config = read_model_config(settings.model)
    return Profile(
        schema_version=SCHEMA_VERSION,
        fingerprint=fingerprint(settings.model),
        model=settings.model.name,
        num_layers=model.num_layers,
        num_kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        calibration={
            MOA.name: {
                **{name: _plain(value) for name, value in vars(settings).items()},
                "validated_tokens": validated_tokens,
                "aim": best.aim,
                "density_at": {n: round(mean_density(served, n), 4) for n in lengths},
                "kl_text": best.kl_text,
                "kl_retrieval": best.kl_retrieval,
                "plans": [
                    {key: value for key, value in asdict(plan).items() if key != "rules"}
                    for plan in plans
                ],
            }
        },
    ).with_section(MOA.name, section)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return value.name  # no folder of the user's
    return value if isinstance(value, int | float | None) else str(value)
