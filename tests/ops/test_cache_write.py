"""``cache_write`` moves bits: every implementation against a token-by-token loop."""

from __future__ import annotations

import pytest
import torch

from attn_backends.ops.cache_write.api import implementations
from attn_backends.ops.dispatch import OpContext, OpImpl
from kvcache.layout import KVOrder, PagedKVLayout, kv_views
from tests.ops.builders import device_of, skip_unless_supported
from tests.tolerances import assert_bitwise_equal

IMPLS = [pytest.param(impl, id=impl.name) for impl in implementations()]
ORDERS = [pytest.param(order, id=order.value) for order in KVOrder]
SHAPES = [
    pytest.param(torch.bfloat16, 32, 2, 64, id="bf16-block32-heads2-size64"),
    pytest.param(torch.float16, 64, 1, 128, id="fp16-block64-heads1-size128"),
    pytest.param(torch.float32, 128, 3, 80, id="fp32-block128-heads3-size80"),
    pytest.param(torch.bfloat16, 16, 4, 96, id="bf16-block16-heads4-size96"),
    pytest.param(torch.float32, 48, 5, 72, id="fp32-block48-heads5-size72"),
]
NUM_BLOCKS, NUM_TOKENS = 4, 37


def _check(
    impl: OpImpl, layout: PagedKVLayout, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor
) -> None:
    """Writes into a cache of NaN and compares with a loop over tokens, bit for bit."""
    device = device_of(impl)
    skip_unless_supported(impl, OpContext(layout, layout.num_kv_heads, device, False))
    blank = torch.full(layout.shape, torch.nan, dtype=layout.dtype)
    expected_key, expected_value = kv_views(blank.clone(), layout.order)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            block, offset = divmod(slot, layout.block_size)
            expected_key[block, :, offset] = key[token]
            expected_value[block, :, offset] = value[token]
    key_cache, value_cache = kv_views(blank.to(device), layout.order)
    impl.run(key.to(device), value.to(device), key_cache, value_cache, slots.to(device))
    assert_bitwise_equal(key_cache.cpu(), expected_key)
    assert_bitwise_equal(value_cache.cpu(), expected_value)


def _shuffled_slots(layout: PagedKVLayout) -> torch.Tensor:
    return torch.randperm(layout.num_blocks * layout.block_size)[:NUM_TOKENS]


@pytest.mark.parametrize(("dtype", "block_size", "num_kv_heads", "head_size"), SHAPES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("impl", IMPLS)
def test_tokens_land_in_their_slots_and_nothing_else_changes(
    impl: OpImpl,
    order: KVOrder,
    dtype: torch.dtype,
    block_size: int,
    num_kv_heads: int,
    head_size: int,
) -> None:
    layout = PagedKVLayout(NUM_BLOCKS, block_size, num_kv_heads, head_size, dtype, order)
    key, value = torch.randn(2, NUM_TOKENS, num_kv_heads, head_size).to(dtype)
    slots = _shuffled_slots(layout)
    slots[::5] = -1  # padding
    _check(impl, layout, key, value, slots)


@pytest.mark.parametrize("impl", IMPLS)
def test_keys_and_values_may_be_slices_of_one_projection(impl: OpImpl) -> None:
    layout = PagedKVLayout(NUM_BLOCKS, 32, 2, 64, torch.bfloat16, _native_order(impl))
    fused = torch.randn(NUM_TOKENS, 6, 64).to(torch.bfloat16)
    slots = _shuffled_slots(layout)
    _check(impl, layout, fused[:, 2:4], fused[:, 4:6], slots)


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_infinity_and_signed_zero_survive(impl: OpImpl) -> None:
    layout = PagedKVLayout(NUM_BLOCKS, 32, 2, 64, torch.bfloat16, _native_order(impl))
    key, value = torch.randn(2, NUM_TOKENS, 2, 64).to(torch.bfloat16)
    key[:, :, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0])
    _check(impl, layout, key, value, _shuffled_slots(layout))


@pytest.mark.parametrize("impl", IMPLS)
def test_no_tokens_and_all_padding_change_nothing(impl: OpImpl) -> None:
    layout = PagedKVLayout(NUM_BLOCKS, 32, 2, 64, torch.bfloat16, _native_order(impl))
    for num_tokens in (0, 3):
        key, value = torch.randn(2, num_tokens, 2, 64).to(torch.bfloat16)
        _check(impl, layout, key, value, torch.full((num_tokens,), -1))


def _native_order(impl: OpImpl) -> KVOrder:
    return KVOrder.KEY_TRANSPOSED if impl.name == "cpu" else KVOrder.FUSED
