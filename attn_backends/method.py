"""What a sparse-decode method is: a config, a schedule, a selector, and honest limits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import torch

from attn_backends.batch import RowOptions
from attn_backends.config import MethodConfig
from attn_backends.plan import LayerSchedule, StepPlan
from attn_backends.profile import ProfileSection
from kvcache.entries import KVEntry, layer_entries
from kvcache.retention import KeepAll


@dataclass(frozen=True)
class Geometry:
    """What a selector must know about the layers it serves."""

    num_layers: int
    num_kv_heads: int
    num_query_heads: int
    head_size: int
    block_size: int
    max_num_reqs: int
    max_model_len: int
    model_path: str = ""  # folder or hub name, for finding a shipped profile


@dataclass(frozen=True)
class StepRows:
    """What a selector must know about the rows of a step, decode rows first.

    Attributes:
        seq_lens: ``[num_decodes]`` int32 on the device, tokens of the decode rows, the current
            one included.
        seq_lens_cpu: the same on the host, possibly an upper bound; None where nobody knows.
        num_rows: decode and prefill rows.
        request_ids: of the decode rows, under ``LayerSchedule.prompts_see_everything`` of prefill
            rows, too; empty where the engine does not tell them.
        options: by index of the decode row, for rows whose request asked for something itself.
        ended_ids: requests that ended since the step before.
        prompt_rows: decode rows whose token is of a prompt: they read everything, as prefill does.
        dense_until: of decode and prefill rows, for ``LayerSchedule.prompts_see_everything``: the
            position from which spans hold, ``EVERYTHING_TOKENS`` where the request asks for all of
            its context; None of rows that are nobody's. Empty where no row is known.
        prefill_queries: positions of each prefill row's queries, for the same; empty where no row
            is known.
        draft_index: which draft of a step the rows are, from 0, where they are drafts.
    """

    seq_lens: torch.Tensor
    seq_lens_cpu: torch.Tensor | None
    num_rows: int
    request_ids: Sequence[str | None] = ()
    options: Mapping[int, RowOptions] = field(default_factory=dict)
    ended_ids: Collection[str] = ()
    prompt_rows: Sequence[int] = ()
    dense_until: Sequence[int | None] = ()
    prefill_queries: Sequence[range] = ()
    draft_index: int = 0

    @property
    def num_decodes(self) -> int:
        """Decode rows."""
        return len(self.seq_lens)


class Selector(Protocol):
    """Plans what decode rows read; owns persistent buffers."""

    def plan(self, rows: StepRows) -> StepPlan:
        """The plan of a step, made once for all layers, without host synchronisation; a new
        object each time.

        Its tensors are views of persistent buffers, valid until the next call. For a given
        number of rows they are the same ones in every step, and so are the ways that layers go;
        a step in which a guard checks or kept selections are read may differ, on CPUs alone. Rows
        without tokens are a graph's padding: they read nothing.
        """
        ...


@dataclass(frozen=True)
class Capabilities:
    """What users must know before they choose the method (``vllm-ext methods``)."""

    reads: str
    frees: str
    limits: str


class Purpose(Enum):
    """What a method is there for; commands choose by it what they run unless told otherwise."""

    SERVING = "serving"  # costs fidelity, saves time or memory
    CHECK = "check"  # answers as dense does, saves nothing
    BOUND = "bound"  # how good a selection could be, saves nothing


def keep_everything(
    config: MethodConfig, schedule: LayerSchedule, geometry: Geometry
) -> tuple[KVEntry, ...]:
    """Entries of methods that forget nothing: one per layer that is not dropped."""
    return layer_entries((KeepAll(),) * geometry.num_layers, schedule.dropped)


@dataclass(frozen=True)
class SparseMethod:
    """One entry of the registry: everything the product knows about a method.

    Attributes:
        name: the value of ``--attention-backend``.
        summary: one line for tables.
        paper: source.
        config_cls: frozen dataclass of the method's settings.
        schedule: ``(config, geometry) -> LayerSchedule``.
        make_selector: ``(config, schedule, geometry, device) -> Selector``, with the method's
            own schedule.
        capabilities: what it reads and frees, and where it does not work.
        row_options: what a request may ask for itself, names under ``vllm_xargs``: ``sparse`` (on,
            off or a preset) and ``budget_tokens``.
        entries: ``(config, schedule, geometry) -> `` what is cached, and what of it is kept.
        purpose: see ``Purpose``.
        reach: settings in tokens that add up to what a decode row reads in a sparse layer, as far
            as the config has them; evaluation varies the last.
        profile_section: what the method reads of a profile; None: it reads none.
        needs_profile: there is no serving a checkpoint without one; commands that compare methods
            take such a method when it is named.
        chunk_tokens: of a prompt that ``vllm-ext serve`` schedules in one step on CPUs, where the
            user does not choose: what is freed lags behind by that much. None: vLLM's choice.
    """

    name: str
    summary: str
    paper: str
    config_cls: type[MethodConfig]
    schedule: Callable[..., LayerSchedule]
    make_selector: Callable[..., Selector]
    capabilities: Capabilities
    row_options: frozenset[str] = frozenset()
    entries: Callable[..., tuple[KVEntry, ...]] = keep_everything
    purpose: Purpose = Purpose.SERVING
    reach: tuple[str, ...] = ("budget_tokens",)
    profile_section: type[ProfileSection] | None = None
    needs_profile: bool = False
    chunk_tokens: int | None = None
