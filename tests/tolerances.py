"""How close is close enough; derived, so that nobody tunes a number to make a test pass.

Attention
    The yardstick is a dense computation in fp64. The kernel may be at most twice (in fp32
    four times: docs/adr/0006) as far from it as a plain eager computation in the kernel's
    own dtype, plus one rounding of the largest result: where eager happens to be exact, the
    kernel still has to round its output and may sum in another order.
Data movement
    Exact, NaN and signed zeros included.

Loosening either needs an ADR.
"""

from __future__ import annotations

import torch

EAGER_FACTOR = {torch.float32: 4.0, torch.bfloat16: 2.0, torch.float16: 2.0}


def assert_no_worse_than_eager(
    actual: torch.Tensor,
    exact_fp64: torch.Tensor,
    eager_low_precision: torch.Tensor,
    dtype: torch.dtype,
) -> None:
    """Bounds the largest error of a kernel by that of an eager computation.

    Args:
        actual: the kernel's result, in ``dtype``.
        exact_fp64: the same in fp64.
        eager_low_precision: the same, every step computed in ``dtype``.
        dtype: of the kernel's inputs and outputs.

    Raises:
        AssertionError: NaN or infinity, or an error beyond the bound.
    """
    assert actual.dtype == dtype
    assert exact_fp64.dtype == torch.float64
    finite = actual.isfinite()
    assert finite.all(), f"{int((~finite).sum())} of {actual.numel()} results are not finite"
    error = (actual.double() - exact_fp64).abs().max().item()
    eager_error = (eager_low_precision.double() - exact_fp64).abs().max().item()
    rounding = torch.finfo(dtype).eps * exact_fp64.abs().max().item()
    bound = EAGER_FACTOR[dtype] * eager_error + rounding
    assert error <= bound, f"error {error:.3e} > {bound:.3e} (eager {eager_error:.3e})"


def assert_bitwise_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Same bits, for data movement and for invariances; NaN equals the same NaN."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    bits = {2: torch.int16, 4: torch.int32}[actual.element_size()]
    different = actual.contiguous().view(bits) != expected.contiguous().view(bits)
    assert not different.any(), f"{int(different.sum())} of {actual.numel()} elements differ"
