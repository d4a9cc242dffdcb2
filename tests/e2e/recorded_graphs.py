"""CUDA graphs without CUDA, for vLLM's V2 runner on a CPU (``v2_runner.py``).

What happens while one is captured is written down: every operator of torch, every op of ours and
every kernel in Triton's interpreter, with the very tensors and the numbers it was given. A replay
does the same again, on the same tensors, and nothing of Python in between: whatever a step changes
must be data in buffers that stay, as for a real graph. What operators allocated holds nothing when
a replay begins. What waits for the device, or sends it a list of the host's, is an error.

Ops of ours are written down as they are called: what they are inside (on a CPU, C++) is not seen.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

_CAPTURE_SIZES = [1, 2, 4, 8, 16]
# What a device cannot do while a graph is captured: tell the host something, or be sent its lists.
_FORBIDDEN = {
    *("aten::_local_scalar_dense", "aten::equal", "aten::allclose", "aten::lift_fresh"),
    *("aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::resolve_conj"),
    "aten::resolve_neg",
}
_SIZED_BY_DATA = {"aten::repeat_interleave.Tensor", "aten::repeat_interleave.self_Tensor"}
_recording: RecordedGraph | None = None
# By the manager's kind and the tokens of each row: how often a graph was replayed.
replays: Counter[tuple[str, int]] = Counter()


class RecordedGraph:
    """Stands for ``torch.cuda.CUDAGraph``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._calls: list[tuple[Callable[..., Any], Any, Any, Any]] = []
        self._given: set[int] = set()  # storages that were there before
        self._made: dict[int, torch.Tensor] = {}  # by storage, what the graph allocates

    def add(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Calls a function, now and in every replay."""
        global _recording
        _recording, here = None, _recording
        try:
            with _disable_current_modes():
                result = function(*args, **kwargs)
        finally:
            _recording = here
        for tensor in _tensors((args, kwargs)):
            if _storage(tensor) not in self._made:
                self._given.add(_storage(tensor))
        for tensor in _tensors(result):
            if _storage(tensor) not in self._given:
                self._made.setdefault(_storage(tensor), tensor)
        self._calls.append((function, args, kwargs, result))
        return result

    @torch.inference_mode()
    def replay(self) -> None:
        """Does again what was captured."""
        for tensor in self._made.values():
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)
            elif tensor.dtype is not torch.bool:
                tensor.fill_(torch.iinfo(tensor.dtype).min)
        for function, args, kwargs, result in self._calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _Recording(TorchDispatchMode):
    def __init__(self, graph: RecordedGraph) -> None:
        super().__init__()
        self._graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, overload = func._schema.name, func._schema.overload_name
        by_mask = name in ("aten::index", "aten::index_put", "aten::index_put_") and any(
            index.dtype in (torch.bool, torch.uint8) for index in _tensors(args[1])
        )
        if name in _FORBIDDEN or by_mask or f"{name}.{overload}" in _SIZED_BY_DATA:
            raise RuntimeError(f"{func} while a graph is captured")
        # In inference mode operators come whole, with what they read hidden inside.
        with self:
            result = func.decompose(*args, **(kwargs or {}))
        return self._graph.add(func, args, kwargs or {}) if result is NotImplemented else result


@contextlib.contextmanager
def _graph(graph: RecordedGraph, *args: Any, **kwargs: Any) -> Iterator[None]:
    """Stands for ``torch.cuda.graph``."""
    global _recording
    _recording = graph
    try:
        with _Recording(graph):
            yield
    finally:
        _recording = None


def _recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if _recording is None:
            return function(*args, **kwargs)
        return _recording.add(function, args, kwargs)

    return call


def use_recorded_graphs() -> None:
    """Makes V2 engines of this process capture and replay full decode graphs."""
    from triton.runtime.interpreter import GridExecutor
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.worker.gpu import cudagraph_utils, model_runner

    from attn_backends.adapter import metadata, rows
    from attn_backends.ops import resolution

    kernel, resolve = GridExecutor.__call__, resolution.resolve
    GridExecutor.__call__ = lambda self, *args, **kwargs: _recorded(kernel)(self, *args, **kwargs)

    def resolve_recorded(*args: Any) -> Any:
        impl = resolve(*args)
        return replace(impl, run=_recorded(impl.run))

    resolution.resolve = resolve_recorded
    torch.cuda.CUDAGraph, torch.cuda.graph = RecordedGraph, _graph  # type: ignore[misc,assignment]
    torch.accelerator.empty_cache = torch.accelerator.synchronize = lambda: None
    torch.accelerator.get_memory_info = lambda *args: (0, 0)
    cudagraph_utils.graph_capture = lambda **kwargs: contextlib.nullcontext()
    cudagraph_utils.capture_pool = lambda pool, config: contextlib.nullcontext(pool)
    cudagraph_utils.current_stream = lambda: None
    model_runner.lock_workspace = lambda: None
    run = cudagraph_utils.CudaGraphManager.run_fullgraph

    def run_fullgraph(self: Any, desc: Any) -> Any:
        replays[type(self).__name__, desc.uniform_token_count] += 1
        return run(self, desc)

    cudagraph_utils.CudaGraphManager.run_fullgraph = run_fullgraph
    cudagraph_utils.capture_outside_cumem_pool = contextlib.nullcontext
    CpuPlatform.get_global_graph_pool = CpuPlatform.graph_pool_handle = lambda self: None
    # Layers call Python, which is recorded, and not an operator around it.
    CpuPlatform.opaque_attention_op = classmethod(lambda cls: False)
    metadata.kinds_by_order = rows.kinds_by_tokens  # as on GPUs
    _use_full_graphs()
    _capture_as_gpu_workers_do()


def _use_full_graphs() -> None:
    from vllm.config import CUDAGraphMode
    from vllm.platforms.cpu import CpuPlatform

    update = CpuPlatform.check_and_update_config

    def check_and_update_config(vllm_config: Any) -> None:
        update(vllm_config)
        compilation = vllm_config.compilation_config
        compilation.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
        compilation.cudagraph_capture_sizes = _CAPTURE_SIZES
        compilation.max_cudagraph_capture_size = _CAPTURE_SIZES[-1]

    CpuPlatform.check_and_update_config = check_and_update_config


def _capture_as_gpu_workers_do() -> None:
    """Once to measure what graphs take, on a KV cache that is dropped, then for good."""
    from vllm.v1.worker.cpu_worker import CPUWorker

    from attn_backends.adapter import worker

    measure, warm_up = CPUWorker.determine_available_memory, CPUWorker.compile_or_warm_up_model

    def determine_available_memory(self: Any) -> int:
        available_bytes: int = measure(self)
        self.model_runner.profile_cudagraph_memory()
        return available_bytes

    def compile_or_warm_up_model(self: Any) -> Any:
        times = warm_up(self)
        self.model_runner.capture_model()
        return times

    CPUWorker.determine_available_memory = determine_available_memory
    CPUWorker.compile_or_warm_up_model = compile_or_warm_up_model
    bases = (worker.ReadyBeforeServing, worker.ExtCPUWorker)
    worker.ExtCPUWorker = type("ExtCPUWorker", bases, {})  # type: ignore[misc]
