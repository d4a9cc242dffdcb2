"""What the Triton implementations share: when they can serve, their tiles, and their launches.

Triton itself is not imported here. A launch is a record that is made apart from its start: tests
make the same records without a device and compile them (tests/ops/test_triton_compiles.py).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from attn_backends.ops.dispatch import OpContext

MAX_HEAD_SIZE = 256
SUPPORTED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHARED_BYTES = 227 * 1024  # of an H100 or H200; assumed where there is no card to ask
SPARE_SHARED_BYTES = 2048  # what a kernel may need beside its tiles
# More programs than fill any card several times over; those without work still cost a start each.
MAX_PROGRAMS = 4096
MAX_WORKSPACE_BYTES = 128 << 20  # a batch that would need more is served in parts
# Keys or values of one tile in fp32, which tensor cores do not take: the tile goes through
# registers, and a larger one would not fit there.
MAX_FP32_TILE_ELEMENTS = 4096


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        kernel: its name among its module's kernels.
        grid: programs in each dimension.
        arguments: tensors and scalars in the kernel's order.
        constants: its constexpr parameters.
        num_warps: of a program.
        num_stages: of its software pipeline.
    """

    kernel: str
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 1

    def start(self, kernels: Mapping[str, Any]) -> None:
        """Launches one of the compiled ``kernels``."""
        kernels[self.kernel][self.grid](
            *self.arguments,
            **self.constants,
            num_warps=self.num_warps,
            num_stages=self.num_stages,
        )


@dataclass(frozen=True)
class Tile:
    """How many tokens a program loads at a time, and how many tiles are in flight."""

    tokens: int
    num_stages: int


def power_of_two(number: int) -> int:
    """The least power of two that is at least ``number``."""
    return 1 << max(number - 1, 0).bit_length()


def padded_head(head_size: int) -> int:
    """Lanes of a head: a power of two, and what ``tl.dot`` needs at least."""
    return max(16, power_of_two(head_size))


def interpreted() -> bool:
    """Whether Triton's interpreter stands in for a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def shared_bytes_of(tensor: torch.Tensor) -> int:
    """Shared memory that a program may have where ``tensor`` is."""
    return _shared_bytes(tensor.device.index) if tensor.is_cuda else SHARED_BYTES


@functools.cache
def _shared_bytes(device_index: int) -> int:
    properties: Any = torch.cuda.get_device_properties(device_index)
    return int(properties.shared_memory_per_block_optin)


@functools.cache
def tile_of(
    head_size: int, dtype: torch.dtype, tensors: int, shared_bytes: int, used_bytes: int = 0
) -> Tile:
    """The largest tile, in as deep a pipeline, that fits into shared memory.

    Args:
        head_size: of the cache.
        dtype: of the cache.
        tensors: how many are loaded per tile: 2, or 1 for keys alone.
        shared_bytes: of the card, per program.
        used_bytes: what else is kept there.
    """
    head_pad = padded_head(head_size)
    if dtype == torch.float32:
        return Tile(max(16, min(64, MAX_FP32_TILE_ELEMENTS // head_pad)), 1)
    room = shared_bytes - SPARE_SHARED_BYTES - used_bytes
    for tokens, num_stages in ((128, 3), (64, 3), (64, 2), (32, 2)):
        if tensors * tokens * head_pad * dtype.itemsize * num_stages <= room:
            return Tile(tokens, num_stages)
    return Tile(16, 2)


def programs_per_head(num_splits: int, num_rows_and_heads: int) -> int:
    """Programs that serve the splits of one row and head: one per split, within reason."""
    return min(num_splits, max(1, MAX_PROGRAMS // num_rows_and_heads))


def rows_at_once(num_rows: int, workspace_bytes_per_row: int) -> int:
    """Rows that share a launch, so that their workspace stays within its limit."""
    fitting = max(1, MAX_WORKSPACE_BYTES // max(1, workspace_bytes_per_row))
    # In fours: a part's lengths then begin at an address like the whole's.
    return min(num_rows, fitting // 4 * 4 or fitting)


def start(kernels: Mapping[str, Any], launches: Iterable[Launch]) -> None:
    """Launches one after another.

    Args:
        kernels: compiled, by name.
        launches: of these kernels.
    """
    for launch in launches:
        launch.start(kernels)


@contextmanager
def rounded(out: torch.Tensor) -> Iterator[torch.Tensor]:
    """What kernels write to. The interpreter truncates when it converts to bf16: there it is fp32,
    and torch does the rounding.
    """
    target = out.float() if interpreted() else out
    yield target
    if target is not out:
        out.copy_(target)


def cache_strides(key_cache: torch.Tensor, value_cache: torch.Tensor) -> dict[str, int]:
    """Constants of a kernel that reads or writes the cache: they never change in service."""
    return _cache_strides(key_cache.stride(), value_cache.stride())


@functools.cache
def _cache_strides(key: tuple[int, ...], value: tuple[int, ...]) -> dict[str, int]:
    dimensions = ("BLOCK", "HEAD", "TOKEN", "DIM")
    return {
        f"STRIDE_{name}_{dimension}": stride
        for name, strides in (("KEY", key), ("VALUE", value))
        for dimension, stride in zip(dimensions, strides, strict=True)
    }


def check_heads_are_contiguous(query: torch.Tensor, out: torch.Tensor | None) -> None:
    """Kernels step from head to head by the head's size.

    Raises:
        ValueError: the heads of a token are apart.
    """
    for name, tensor in (("query", query), ("out", out)):
        if tensor is not None and tensor.stride()[1:] != (tensor.shape[2], 1):
            raise ValueError(
                f"{name} has strides {tensor.stride()} for shape {tuple(tensor.shape)}; it must be "
                "contiguous per token"
            )


def unsupported_reason(
    context: OpContext, kernels: Callable[[], object], computes: bool = True
) -> str | None:
    """None when kernels can serve ``context``, else a short reason.

    Args:
        context: what must be served.
        kernels: imports Triton.
        computes: and does not only move data: then sizes and dtypes have limits.
    """
    if context.device_type == "cpu" and not interpreted():
        return "Triton does not run on CPU (TRITON_INTERPRET=1 runs its slow interpreter)"
    layout = context.layout
    if computes and layout.head_size > MAX_HEAD_SIZE:
        return f"head_size {layout.head_size} is more than {MAX_HEAD_SIZE}"
    if computes and layout.dtype not in SUPPORTED_DTYPES:
        return f"KV cache dtype {layout.dtype} is not one of bfloat16, float16, float32"
    try:
        kernels()
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    return None
