"""Runs jobs on a vLLM engine in a process of its own, which can look into the scheduler.

Importing vLLM takes as long as a short job. So a process that has imported it, and done nothing
else, is kept for each environment, and engines are forked from it.
"""

from __future__ import annotations

import atexit
import ctypes
import json
import multiprocessing
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from tests.e2e.recorded_graphs import replays
from tests.e2e.v2_runner import ENVIRONMENT, use_v2_runner
from vllm_ext.child import Child, Parent, quiet_environment

ROOT = Path(__file__).resolve().parents[2]
_kept: dict[frozenset[tuple[str, str | None]], Child] = {}  # by changes of the environment


def run_engine(
    engine: dict[str, Any],
    jobs: list[dict[str, Any]],
    env: dict[str, str] | None = None,
    registry: dict[str, str] | None = None,
    known: dict[str, Any] | None = None,
    v2: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Starts an engine, runs jobs in order, stops it.

    Args:
        engine: keyword arguments of ``vllm.LLM``.
        jobs: each ``{"prompts": [[ids]], "together": bool, "max_tokens": n}``, and optionally
            ``"extra_args"``, one object or null per prompt; ``"preempt_at"``, steps after which
            every running request is preempted (prompts together); ``"abort_at"``, steps after
            which the last request that is still in prefill is aborted and asked again later;
            ``"params"``, more of ``SamplingParams``, which win, or a ``"json_schema"``.
        env: additions to the environment.
        registry: methods that stand in the registry besides ours.
        known: see ``known_drafts.replace_drafts``; None: drafts are the drafter's.
        v2: see ``v2_runner.use_v2_runner``; None: the runner that vLLM has on CPUs.

    Returns:
        ``{"jobs": [[{"tokens": [...], "logprobs": [[id, logprob], ...]}]], "rows": {...},
        "preemptions": n, "prefix_hits": tokens, "freed_blocks": [by KV group], "num_blocks": n,
        "lost_blocks": n, "figures": {...}, "routes": [[by prompt] by job], "drafts": {...},
        "is_async": bool, "replays": {...}}`` with the logprob of each token; ``num_blocks`` is the
        size of the KV pool, ``lost_blocks`` what of it is not free in the end, ``figures`` all
        other figures of ours by name and the last of their labels, ``routes`` what the scheduler
        learned of each request, null where nothing, ``drafts`` vLLM's own figures of speculative
        decoding, ``is_async`` how steps were scheduled, ``replays`` of CUDA graphs (``v2``).

    Raises:
        UserError: the engine failed; the message ends with its log.
        TimeoutError: no answer within 25 minutes.
    """
    changes = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TRITON_INTERPRET": None}
    # Nothing is timed: alone, the engine takes the core that vLLM leaves to its server, too.
    changes |= {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0", **(env or {})}
    changes |= ENVIRONMENT if v2 else {}
    # What vLLM must find when it is imported needs a process that has not imported it.
    is_forked = not (registry or v2)
    spec = {"engine": engine, "jobs": jobs, "registry": registry or {}, "known": known, "v2": v2}
    spec |= {"is_forked": is_forked}
    key = frozenset(changes.items())
    child = _kept.pop(key, None) if is_forked else None
    if child is None:
        child = Child("engine", "tests.e2e.engine", quiet_environment(changes), ROOT)
    try:
        answer: dict[str, Any] = child.ask(spec, limit_s=1500)
    except BaseException:
        child.close()
        raise
    if is_forked:
        _kept[key] = child
    else:
        child.close()
    return answer


def end_engines() -> None:
    """Ends the processes that are kept."""
    while _kept:
        _kept.popitem()[1].close()


def small_engine(
    model_path: str, backend: str | None, settings: dict[str, Any], kv_mib: int, **options: Any
) -> dict[str, Any]:
    """An fp32 engine for prompts of up to 1,500 tokens.

    Args:
        model_path: folder.
        backend: a method's name, or None for stock vLLM.
        settings: the method's.
        kv_mib: MiB of its KV pool.
        options: more of ``vllm.LLM``, which win.
    """
    ours = {"attention_backend": backend, "additional_config": {"vllm_ext": settings}}
    return {
        "model": model_path,
        "dtype": "float32",
        "max_model_len": 1600,
        "kv_cache_memory_bytes": kv_mib << 20,
        "enforce_eager": True,
        "max_num_batched_tokens": 512,
        **(ours if backend else {}),
        **options,
    }


def tokens_of(answers: list[dict[str, Any]]) -> list[list[int]]:
    """The tokens of a job's answers."""
    return [answer["tokens"] for answer in answers]


def _generate(llm: Any, job: dict[str, Any]) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    extra_args = job.get("extra_args") or [None] * len(job["prompts"])
    requests = [
        (
            {"prompt_token_ids": ids},
            SamplingParams(
                **{
                    "temperature": 0,
                    "max_tokens": job["max_tokens"],
                    "ignore_eos": True,
                    "detokenize": False,
                    "logprobs": 0,
                    "extra_args": extra,
                    **_params(job.get("params", {})),
                }
            ),
        )
        for ids, extra in zip(job["prompts"], extra_args, strict=True)
    ]
    if "preempt_at" in job or "abort_at" in job:
        batches = [_disturbed(llm, requests, job.get("preempt_at", []), job.get("abort_at", []))]
    else:
        batches = [requests] if job["together"] else [[request] for request in requests]
        batches = [
            llm.generate(*[list(column) for column in zip(*batch, strict=True)], use_tqdm=False)
            for batch in batches
        ]
    answers = []
    for outputs in batches:
        for output in outputs:
            completion = output.outputs[0]
            tokens = list(completion.token_ids)
            answers.append(
                {
                    "tokens": tokens,
                    "text": completion.text,
                    "logprobs": [
                        step[token].logprob
                        for step, token in zip(completion.logprobs or [], tokens, strict=False)
                    ],
                }
            )
    return answers


def _params(asked: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``SamplingParams``."""
    from vllm.sampling_params import StructuredOutputsParams

    schema = asked.get("json_schema")
    given = {name: value for name, value in asked.items() if name != "json_schema"}
    if schema is not None:
        given["structured_outputs"] = StructuredOutputsParams(json=schema)
    return given


def _disturbed(
    llm: Any, requests: list[Any], preempt_at: list[int], abort_at: list[int]
) -> list[Any]:
    """All requests at once; some steps preempt what runs, or abort a request in prefill."""
    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    numbers = {}  # by the id inside the engine

    def add(number: int, tag: str) -> None:
        prompt, params = requests[number]
        numbers[engine.add_request(f"{number}{tag}", prompt, params)] = number

    for number in range(len(requests)):
        add(number, "")
    outputs: dict[int, Any] = {}
    step = 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                outputs[int(output.request_id.partition("-")[0])] = output
        step += 1
        if step in preempt_at:
            assert scheduler.running, "nothing ran: nothing was preempted"
            scheduler.reset_prefix_cache(reset_running_requests=True)
        if step in abort_at:
            reading = [r for r in scheduler.running if r.num_computed_tokens < r.num_prompt_tokens]
            assert reading, "no request was in prefill: nothing was aborted"
            victim = reading[-1].request_id
            number = numbers[victim] if victim in numbers else int(victim.split("-")[0])
            engine.abort_request([victim], internal=True)
            add(number, "-again")
    return [outputs[number] for number in range(len(requests))]


def _figures() -> dict[str, float]:
    """``name|label value`` for samples with a label beside the method's name, else ``name``."""
    from kvcache.adapter.figures import metrics_folder
    from vllm_ext.metrics import WorkerFigures

    folder = metrics_folder()
    assert folder is not None
    found = {}
    for family in WorkerFigures(folder).collect():
        for sample in family.samples:
            labels = [value for name, value in sample.labels.items() if name != "method"]
            found["|".join([family.name, *labels[-1:]])] = sample.value
    return found


def _noting_routes() -> dict[int, int]:
    """Routes that the scheduler learns of from now on, by the number of the request."""
    from kvcache.adapter.news import routes_of
    from kvcache.adapter.scheduler import RoutingScheduler

    learned: dict[int, int] = {}
    stock = RoutingScheduler.update_from_output

    def update(self: Any, scheduler_output: Any, output: Any) -> Any:
        for request_id, route in routes_of(output).items():
            learned[int(request_id.partition("-")[0])] = route
        return stock(self, scheduler_output, output)

    RoutingScheduler.update_from_output = update  # type: ignore[method-assign]
    return learned


def _routed(llm: Any, jobs: list[dict[str, Any]], routes: list[list[int | None]]) -> Any:
    """Answers to jobs; what each job's requests were routed like is added."""
    learned = _noting_routes()
    for job in jobs:
        learned.clear()
        yield _generate(llm, job)
        first = 0 if "preempt_at" in job or "abort_at" in job else min(learned, default=0)
        routes.append([learned.get(first + number) for number in range(len(job["prompts"]))])


def _drafts(llm: Any) -> dict[str, Any]:
    """What vLLM counted of speculative decoding; empty where there is none."""
    prefix = "vllm:spec_decode_num_"
    metrics = [metric for metric in llm.get_metrics() if metric.name.startswith(prefix)]
    return {
        metric.name.removeprefix(prefix): (
            metric.value if hasattr(metric, "value") else metric.values
        )
        for metric in metrics
    }


def _run(spec: dict[str, Any]) -> dict[str, Any]:
    from attn_backends.methods import REGISTRY

    REGISTRY.update(spec["registry"])  # before vLLM asks for plugins
    if spec["v2"] is not None:
        use_v2_runner(**spec["v2"])
    from vllm import LLM

    if spec["known"] is not None:
        from tests.e2e.known_drafts import replace_drafts

        replace_drafts(**spec["known"])
    llm = LLM(**{"disable_log_stats": False, "seed": 0, **spec["engine"]})
    routes: list[list[int | None]] = []
    jobs = list(_routed(llm, spec["jobs"], routes))
    metrics = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    rows: dict[str, float] = {}
    figures: dict[str, float] = {}
    if not os.environ.get("VLLM_EXT_DISABLE"):
        from vllm_ext.metrics import decode_rows

        rows = {"|".join(key): value for key, value in decode_rows().items()}
        figures = _figures()
    managers = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.coordinator
    freed = [getattr(m, "num_freed_blocks", 0) for m in managers.single_type_managers]
    result = {"jobs": jobs, "rows": rows, "preemptions": metrics["vllm:num_preemptions"]}
    result |= {"prefix_hits": metrics["vllm:prefix_cache_hits"], "routes": routes}
    result |= {"freed_blocks": freed, "figures": figures, "drafts": _drafts(llm)}
    num_blocks = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
    num_held = num_blocks - 1 - managers.block_pool.get_num_free_blocks()  # one is the null block
    result |= {"num_blocks": num_blocks, "lost_blocks": num_held}
    result["is_async"] = llm.llm_engine.vllm_config.scheduler_config.async_scheduling
    result["replays"] = {f"{manager}|{tokens}": n for (manager, tokens), n in replays.items()}
    llm.llm_engine.engine_core.shutdown()
    return result


def _forked(spec: dict[str, Any]) -> Any:
    """The answer of a process that is forked here, once that has ended; it writes to our log.

    Raises:
        SystemExit: it failed.
    """
    reader, writer = multiprocessing.Pipe(duplex=False)
    if not (child := os.fork()):
        status = 1
        try:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with us
            writer.send_bytes(json.dumps(_run(spec), default=float).encode())
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            atexit._run_exitfuncs()
            os._exit(status)
    writer.close()
    try:
        return json.loads(reader.recv_bytes())
    except EOFError:
        sys.exit(1)
    finally:
        os.waitpid(child, 0)


def _main(parent: Parent) -> None:
    for spec in parent:
        if spec["is_forked"]:
            import vllm.entrypoints.llm  # noqa: F401

            parent.answer(_forked(spec))
        else:
            parent.answer(_run(spec))


if __name__ == "__main__":
    _main(Parent())
