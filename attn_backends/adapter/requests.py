"""Per-request options: from ``vllm_xargs`` to the rows of a batch.

The front end validates (``parse_options``; a bad value becomes a 400). The worker records
what each request asked for under its id, and the step's planner asks for the options of its
rows. No hook of vLLM passes them to a builder, hence the worker subclass (worker.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from vllm.utils import length_from_prompt_token_ids_or_embeds

from attn_backends.batch import RowOptions
from attn_backends.budget_config import PRESETS
from attn_backends.method import SparseMethod
from attn_backends.methods import methods_where
from kvcache.adapter.managers import asks_for_everything
from kvcache.spans import EVERYTHING_TOKENS

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput

KEYS = ("sparse", "budget_tokens")  # of which a method takes its ``row_options``
# Request ids of a batch's rows, given the rows' places in the runner's table of requests.
RowIds = Callable[[Sequence[int] | None], Sequence[str | None]]


def parse_options(
    extra_args: Mapping[str, Any] | None,
    method: SparseMethod,
    min_budget_tokens: int,
    presets: Mapping[str, RowOptions] = PRESETS,
) -> RowOptions | None:
    """What a request asks for, or None when it asks for nothing of ours.

    Args:
        extra_args: the request's ``vllm_xargs``.
        method: the server's method.
        min_budget_tokens: smallest budget the server's settings allow.
        presets: what a request may name in ``sparse``, besides on and off.

    Raises:
        ValueError: a value that cannot be honoured; names it and what would work.
    """
    if not extra_args:
        return None
    _refuse_server_settings(extra_args, method)
    ours = {key: extra_args[key] for key in KEYS if key in extra_args}
    if not ours:
        return None
    _refuse_untaken(set(ours), method)
    sparse = ours.get("sparse", "on")
    allowed = ("on", "off", *presets)
    if not isinstance(sparse, str) or sparse not in allowed:
        raise ValueError(f"vllm_xargs.sparse is {sparse!r}; it must be one of {', '.join(allowed)}")
    budget_tokens = ours.get("budget_tokens")
    if budget_tokens is not None and (
        type(budget_tokens) is not int or not min_budget_tokens <= budget_tokens <= 1 << 20
    ):
        raise ValueError(
            f"vllm_xargs.budget_tokens is {budget_tokens!r}; it must be a whole number between "
            f"{min_budget_tokens} and {1 << 20}"
        )
    if sparse in ("off", *presets) and budget_tokens is not None:
        raise ValueError(f"vllm_xargs has budget_tokens and sparse = {sparse}: give one of them")
    return _options_of(ours, presets)


def _refuse_untaken(asked: set[str], method: SparseMethod) -> None:
    """Options that another method takes."""
    untaken = [key for key in KEYS if key in asked - method.row_options]
    if not untaken:
        return
    taken = ", ".join(sorted(method.row_options))
    able = methods_where(lambda other: other.row_options.issuperset(untaken))
    raise ValueError(
        f"vllm_xargs has {', '.join(untaken)}, but {method.name} takes "
        f"{f'only {taken}' if taken else 'no per-request options'}; methods that do: "
        f"{', '.join(able)}"
    )


def _refuse_server_settings(extra_args: Mapping[str, Any], method: SparseMethod) -> None:
    """Keys that are nobody's stay vLLM's business; a setting of the server is an error here."""
    settings = {field.name for field in fields(method.config_cls)}.difference(KEYS)
    for key in sorted(settings.intersection(extra_args)):
        raise ValueError(
            f"vllm_xargs.{key} is {extra_args[key]!r}, but {key} is chosen for the whole server "
            f"(--{key.replace('_', '-')}); drop it"
        )


def _options_of(extra_args: Mapping[str, Any], presets: Mapping[str, RowOptions]) -> RowOptions:
    """Options from arguments that ``parse_options`` accepted."""
    sparse = extra_args.get("sparse", "on")
    if sparse in presets:
        return presets[sparse]
    return RowOptions(sparse == "off", extra_args.get("budget_tokens"))


def _is_beam_step(params: Any) -> bool:
    """Whether a request is one step of one beam: vLLM asks for each as a new prompt.

    Its front ends (``entrypoints/generate/beam_search``) ask for a single token, undecoded, with
    the log-probabilities of twice as many as there are beams. Who asks so by other ways gets a
    single token that prefill made, and is counted with them.
    """
    return (
        params is not None
        and params.max_tokens == 1
        and not params.detokenize
        and bool(params.logprobs)
        and params.logprobs % 2 == 0
    )


def _dense_until(request: NewRequestData, extra_args: Mapping[str, Any] | None) -> int:
    """From where on a request's spans hold; as the KV manager has it, which frees by that."""
    if asks_for_everything(extra_args):
        return EVERYTHING_TOKENS
    return length_from_prompt_token_ids_or_embeds(request.prompt_token_ids, request.prompt_embeds)


class EndedRequests:
    """Requests that ended and that one reader has not been told of yet."""

    def __init__(self) -> None:
        self.ids: list[str] = []

    def take(self) -> list[str]:
        """Those that ended since this was last asked."""
        taken, self.ids = self.ids, []
        return taken


class RequestBook:
    """Options of the requests that are alive in this worker, and news of those that are not."""

    def __init__(self) -> None:
        self._by_id: dict[str, RowOptions] = {}
        self._readers: WeakSet[EndedRequests] = WeakSet()  # they go with their planners
        self._num_beam_steps = 0  # since they were last taken
        self._dense_until: dict[str, int] | None = None  # None: nobody asks
        self.presets: Mapping[str, RowOptions] = PRESETS
        self.num_rows = 0  # of the scheduler's step in hand
        self._last_num_rows = 0
        self.row_ids: RowIds = lambda places: ()

    @contextmanager
    def step(self, scheduler_output: SchedulerOutput) -> Iterator[None]:
        """While it lasts, the first rows of a batch are the requests of this step. Outside, they
        are nobody's: vLLM also runs batches that it made up, to compile, to capture graphs and
        beside other data-parallel engines that have work.
        """
        self.update(scheduler_output)
        self.num_rows = self._last_num_rows = len(scheduler_output.num_scheduled_tokens)
        try:
            yield
        finally:
            self.num_rows = 0

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """While it lasts, rows are those of the last step: drafts follow it before the next one."""
        self.num_rows = self._last_num_rows
        try:
            yield
        finally:
            self.num_rows = self._last_num_rows = 0

    def update(self, scheduler_output: SchedulerOutput) -> None:
        """Takes note of new requests and forgets finished ones; preempted ones stay.

        A later chunk of a streaming-input session arrives as a new request under the old id: its
        options are its own, too.
        """
        for reader in self._readers:
            reader.ids += scheduler_output.finished_req_ids
        for request_id in scheduler_output.finished_req_ids:
            self._by_id.pop(request_id, None)
            if self._dense_until is not None:
                self._dense_until.pop(request_id, None)
        for request in scheduler_output.scheduled_new_reqs:
            params = request.sampling_params
            extra_args = params.extra_args if params is not None else None
            self._num_beam_steps += _is_beam_step(params)
            if self._dense_until is not None and request.req_id not in self._dense_until:
                self._dense_until[request.req_id] = _dense_until(request, extra_args)
            if extra_args and any(key in extra_args for key in KEYS):
                self._by_id[request.req_id] = _options_of(extra_args, self.presets)
            else:
                self._by_id.pop(request.req_id, None)

    def of_rows(self, ids: Sequence[str | None]) -> dict[int, RowOptions]:
        """Options by row index, for rows of these requests."""
        if not self._by_id:
            return {}
        return {row: self._by_id[i] for row, i in enumerate(ids) if i in self._by_id}

    def follow_prompts(self) -> None:
        """From now on the book knows where prompts end (``dense_until``)."""
        if self._dense_until is None:
            self._dense_until = {}

    @property
    def follows_prompts(self) -> bool:
        """Whether somebody asks where prompts end."""
        return self._dense_until is not None

    def dense_until(self, ids: Sequence[str | None], num_rows: int) -> list[int | None]:
        """See ``StepRows.dense_until``. It is what a request began with: of a streaming-input
        session's later chunks nothing is dense, since what they would read may be freed.

        Args:
            ids: of the first rows.
            num_rows: of the batch; the others are nobody's.

        Raises:
            RuntimeError: a request that never came: what it may read is not known, and not all of
                it may be there.
        """
        known = self._dense_until or {}
        if unknown := {*ids[:num_rows]} - {*known, None}:
            raise RuntimeError(f"nobody said where the prompts of {sorted(map(str, unknown))} end")
        limits = [None if name is None else known[name] for name in ids[:num_rows]]
        return limits + [None] * (num_rows - len(limits))

    def ended_requests(self) -> EndedRequests:
        """What a planner asks for requests that end from now on; each planner has its own."""
        reader = EndedRequests()
        self._readers.add(reader)
        return reader

    def take_beam_steps(self) -> int:
        """Steps of beams that arrived since this was last asked."""
        taken, self._num_beam_steps = self._num_beam_steps, 0
        return taken

    def ids_of_rows(
        self, num_rows: int, places: Sequence[int] | None = None
    ) -> Sequence[str | None]:
        """Request ids of the first rows of the batch about to run; fewer where the others are
        padding, none outside of steps.

        Args:
            num_rows: how many are asked for.
            places: of the rows in the runner's table of requests, where the engine tells them.
        """
        num_rows = min(num_rows, self.num_rows)
        if not num_rows:
            return ()
        return self.row_ids(None if places is None else places[:num_rows])[:num_rows]


BOOK = RequestBook()
