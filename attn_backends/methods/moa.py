"""MOA: every KV head sees the sinks and a span of its own, which grows with the position.

Paper: MoA, arXiv 2406.14909 (thu-nics/MoA). We differ:

- a span follows the query's position, not the prompt's final length plus what may be generated,
  which no prefix cache allows: what is cached must not depend on what came after it. A full head
  stays full as generation goes on;
- rules are profiled per KV head, since grouped query heads share what is kept. A file in MoA's own
  format has one per query head: each sees what its own shows, and a KV head keeps what any of its
  query heads sees;
- heads are in a few classes of equal spans, each with block tables of its own (head_classes.py),
  and what no later query sees is freed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from attn_backends.config import MethodConfig, SettingError, one_of
from attn_backends.head_classes import MAX_CLASSES, covered_in_classes, require_unpadded
from attn_backends.method import Capabilities, Geometry, SparseMethod, keep_everything
from attn_backends.moa_rules import load_rules
from attn_backends.plan import LayerRole, LayerSchedule
from attn_backends.profile import NoSectionError, ProfileSection
from attn_backends.sections import AUTO, chosen_section
from attn_backends.windows import WindowSelector, window_entries
from kvcache.entries import KVEntry
from kvcache.spans import Span, everything

RETENTION_CHOICES = ("evict", "keep_all")
SpanClass = Annotated[list[int], Field(min_length=2, max_length=2)]


class HeadSpans(ProfileSection):
    """MOA's part of a profile.

    Attributes:
        sink_tokens: first tokens that every head sees.
        floor_tokens: the least span.
        classes: ``[alpha_tokens, beta_64ths]`` of each class of heads (``kvcache.spans.Span``).
        class_of_head: by layer and KV head.
    """

    made_by: ClassVar[str] = "vllm-ext profile MODEL --method moa --output FILE"

    sink_tokens: int = Field(ge=0, le=1 << 20)
    floor_tokens: int = Field(ge=1, le=1 << 20)
    classes: list[SpanClass] = Field(min_length=1, max_length=MAX_CLASSES)
    class_of_head: list[list[int]]

    def require_shape(self, num_layers: int, num_kv_heads: int) -> None:
        """See ``ProfileSection.require_shape``."""
        heads = [len(layer) for layer in self.class_of_head]
        if heads != [num_kv_heads] * num_layers:
            raise ValueError(
                f"class_of_head has {len(heads)} layers of {sorted({*heads})} heads; the model "
                f"has {num_layers} of {num_kv_heads}"
            )
        places = [number for layer in self.class_of_head for number in layer]
        if {*places} != {*range(len(self.classes))}:
            raise ValueError(
                f"class_of_head names the classes {sorted({*places})[:10]}; it must name each of "
                f"0 to {len(self.classes) - 1}, and no others"
            )
        for number in range(len(self.classes)):
            try:
                self.span(number)
            except ValueError as error:
                raise ValueError(f"classes[{number}]: {error}") from None
        require_unpadded([places.count(number) for number in range(len(self.classes))])

    def span(self, number: int) -> Span:
        """What heads of a class see."""
        return Span(self.sink_tokens, self.floor_tokens, *self.classes[number]).simplest

    def spans(self) -> list[list[Span]]:
        """By layer and KV head."""
        classes = [self.span(number) for number in range(len(self.classes))]
        return [[classes[number] for number in layer] for layer in self.class_of_head]


@dataclass(frozen=True)
class MoaConfig(MethodConfig):
    """Settings of MOA.

    Attributes:
        profile: path of a profile, or ``auto`` for the one shipped for this model.
        rules: path of a file in MoA's published format (alphas and betas per query head), which
            takes the profile's place.
        retention: ``evict`` frees what no later query of a head sees, ``keep_all`` nothing.
    """

    profile: str = AUTO
    rules: str = ""
    retention: str = one_of(RETENTION_CHOICES, default="evict")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rules and self.profile != AUTO:
            raise SettingError("rules", f"is {self.rules!r} beside a profile: give one of them")


def _spans(
    config: MoaConfig, geometry: Geometry
) -> tuple[list[list[Span]], list[list[Span]] | None]:
    """By layer and KV head; by layer and query head, where those have their own.

    Raises:
        ConfigError: no profile, one without MOA's section, or of another shape.
    """
    if config.rules:
        rules = load_rules(Path(config.rules))
        rules.require_shape(geometry.num_layers, geometry.num_query_heads)
        heads = rules.kv_head_spans(geometry.num_kv_heads, geometry.max_model_len)
        flat = covered_in_classes(
            [span for layer in heads for span in layer], geometry.max_model_len
        )
        size = geometry.num_kv_heads
        kept = [flat[layer * size : (layer + 1) * size] for layer in range(geometry.num_layers)]
        return kept, rules.query_head_spans()
    section = chosen_section(config.profile, geometry, METHOD.name, HeadSpans)
    if section is None:
        raise NoSectionError(
            "MOA needs to know what each head sees, and no profile with that is shipped for this "
            f"model; make one with `{HeadSpans.made_by}` and name it (--profile FILE), or give a "
            "file of MoA's (--rules FILE)"
        )
    return section.spans(), None


def _schedule(config: MoaConfig, geometry: Geometry) -> LayerSchedule:
    """Layers that see everything with every head are plain dense ones."""
    heads_of, queries_of = _spans(config, geometry)
    roles, spans, query_spans = [], {}, {}
    for layer, heads in enumerate(heads_of):
        queries = heads if queries_of is None else queries_of[layer]
        is_full = all(span == everything() for span in queries)
        roles.append(LayerRole.DENSE if is_full else LayerRole.WINDOW)
        if is_full:
            continue
        spans[layer] = tuple(heads)
        group = len(queries) // len(heads)
        if queries != [span for span in heads for _ in range(group)]:
            query_spans[layer] = tuple(queries)
    return LayerSchedule(tuple(roles), spans=spans, query_spans=query_spans)


def _selector(
    config: MoaConfig, schedule: LayerSchedule, geometry: Geometry, device: torch.device
) -> WindowSelector:
    return WindowSelector(schedule, geometry, device)


def _entries(config: MoaConfig, schedule: LayerSchedule, geometry: Geometry) -> tuple[KVEntry, ...]:
    if config.retention == "keep_all":
        return keep_everything(config, schedule, geometry)
    return window_entries(schedule, geometry.num_kv_heads)


METHOD = SparseMethod(
    name="MOA",
    summary="each KV head sees sinks and an elastic span of its own, exact per query",
    paper="MoA, arXiv 2406.14909",
    config_cls=MoaConfig,
    schedule=_schedule,
    make_selector=_selector,
    capabilities=Capabilities(
        reads="each head's sinks and span, prefill included",
        frees="what a head's span no longer shows, head by head",
        limits="needs a profile; spans are fixed by position, whatever the prompt asks for",
    ),
    entries=_entries,
    reach=(),
    profile_section=HeadSpans,
    needs_profile=True,
    chunk_tokens=512,
)
