"""vLLM's CUDA kernels behind our ops, with the kernels played in torch: no GPU is needed."""

from __future__ import annotations

import importlib.util
import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")
from vllm.platforms import current_platform
from vllm.v1.attention.backends import fa_utils
from vllm.v1.attention.ops.merge_attn_states import _merge_attn_states_torch

from attn_backends.adapter import ops
from attn_backends.adapter.engine_ops import cuda
from attn_backends.adapter.ops import engine_and_our_ops, op_context, unserved_reasons
from attn_backends.batch import SpanRule
from attn_backends.config import ConfigError
from attn_backends.head_tables import fold_prefill_rule, fold_rule
from attn_backends.ops.cache_write.api import implementations as cache_writers
from attn_backends.ops.dispatch import OpContext
from kvcache.layout import KVOrder, PagedKVLayout, kv_views
from kvcache.spans import Span, everything
from tests.ops.builders import Problem, dense_attention, make_problem, make_rule
from tests.tolerances import assert_bitwise_equal, assert_no_worse_than_eager


def _signature() -> inspect.Signature:
    """Of vLLM's own function; its package refuses to be imported without the kernels."""
    vllm = importlib.util.find_spec("vllm")
    assert vllm is not None
    assert vllm.origin is not None
    file = Path(vllm.origin).parent / "vllm_flash_attn" / "flash_attn_interface.py"
    spec = importlib.util.spec_from_file_location("flash_attn_interface", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return inspect.signature(module.flash_attn_varlen_func)


SIGNATURE = _signature()
SEQ_LENS, QUERY_LENS = (3, 16, 17, 18, 40, 40, 17, 18, 100, 33), (3, 16, 17, 18, 40, 1, 1, 1, 7, 20)


class PlayedFlash:
    """``flash_attn_varlen_func``: its arguments, masks and results, and what it refuses."""

    def __init__(self) -> None:
        self.launches: list[dict[str, Any]] = []

    def __call__(self, **given: Any) -> Any:
        call = SIGNATURE.bind(**given)
        call.apply_defaults()
        args = call.arguments
        self.launches.append(args)
        self._check(args)
        q, out = args["q"], args["out"]
        result = torch.full_like(q, torch.nan) if out is None else out
        lse = q.new_full((q.shape[1], len(q)), torch.nan, dtype=torch.float32)
        if q.device.type != "meta":
            for row in range(len(args["seqused_k"])):
                self._row(args, row, result, lse)
        return (result, lse) if args["return_softmax_lse"] else result

    @staticmethod
    def _check(args: dict[str, Any]) -> None:
        starts, used, table = (args[name] for name in ("cu_seqlens_q", "seqused_k", "block_table"))
        for tensor in (starts, used):
            assert tensor.dtype == torch.int32
            assert tensor.is_contiguous()
        assert table.dtype == torch.int32
        assert table.stride(1) == 1
        assert len(starts) - 1 == len(used) == len(table)
        assert args["k"].shape[1] % 16 == 0
        assert args["k"].stride(3) == args["v"].stride(3) == args["q"].stride(2) == 1
        if args["fa_version"] == 2 and args["max_seqlen_q"] == 1:
            assert len(args["q"]) == len(used)  # its way for GQA takes one query per row
        if args["q"].device.type != "meta":
            assert int(starts.diff().max()) <= args["max_seqlen_q"]
            busy = starts.diff() > 0
            assert int((used * busy).max()) <= args["max_seqlen_k"]

    @staticmethod
    def _row(args: dict[str, Any], row: int, out: torch.Tensor, lse: torch.Tensor) -> None:
        first, last = args["cu_seqlens_q"][row : row + 2].tolist()
        num_keys = int(args["seqused_k"][row])
        if first == last:
            return
        page = args["k"].shape[1]
        pages = args["block_table"][row, : -(-num_keys // page)].long()
        group = args["q"].shape[1] // args["k"].shape[2]
        keys, values = (
            args[name][pages].flatten(0, 1)[:num_keys].repeat_interleave(group, dim=1)
            for name in ("k", "v")
        )
        token = torch.arange(num_keys)
        own = torch.arange(last - first)[:, None] + num_keys - (last - first)
        before, after = args["window_size"] or (-1, -1)
        visible = torch.ones(last - first, num_keys, dtype=torch.bool)
        if args["causal"] or after == 0:
            visible &= token <= own
        if before >= 0:
            visible &= token >= own - before
        logits = torch.einsum("qhd,khd->hqk", args["q"][first:last].float(), keys.float())
        logits = (logits * args["softmax_scale"]).masked_fill(~visible, -torch.inf)
        sums = logits.logsumexp(dim=2)
        weights = (logits - sums[..., None]).exp().nan_to_num(0.0)
        out[first:last] = torch.einsum("hqk,khd->qhd", weights, values.float()).to(out.dtype)
        empty = torch.inf if args["fa_version"] == 2 else -torch.inf
        lse[:, first:last] = sums.masked_fill(sums == -torch.inf, empty)


@pytest.fixture(params=[2, 3])
def played(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> PlayedFlash:
    """A GPU for which vLLM would choose this FlashAttention."""
    flash = PlayedFlash()
    platform = type(current_platform)
    monkeypatch.setattr(platform, "is_cuda", lambda self: True)
    monkeypatch.setattr(platform, "has_device_capability", lambda self, *capability: True)
    monkeypatch.setattr(fa_utils, "flash_attn_varlen_func", flash, raising=False)
    monkeypatch.setattr(fa_utils, "get_flash_attn_version", lambda **asked: request.param)
    monkeypatch.setattr("vllm._custom_ops.merge_attn_states", _merge_attn_states_torch)
    monkeypatch.setattr(ops, "_IN_USE", {})
    return flash


def _problem(**changes: Any) -> Problem:
    return make_problem(**({"seq_lens": SEQ_LENS, "query_lens": QUERY_LENS} | changes))


def _attend(problem: Problem, rule: SpanRule | None) -> torch.Tensor:
    out = problem.out.clone()
    caches = problem.key_cache, problem.value_cache
    cuda.FlashAttention().attend(problem.query, *caches, problem.batch, rule, problem.scale, out)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("span", "num_launches"),
    [
        (None, 1),
        (everything(), 1),
        (Span(0, 12), 1),
        (Span(5, 12), 3),
        (Span(1, 1), 3),
        (Span(16, 32), 3),
        (Span(4, 8, 12, 0), 3),  # a window of 12
        (Span(80, 20), 1),  # hides nothing of the longest row
    ],
)
def test_prefill_is_exact_for_every_row(
    played: PlayedFlash, span: Span | None, num_launches: int, dtype: torch.dtype
) -> None:
    problem = _problem(dtype=dtype, block_size=16)
    rule = None if span is None else make_rule(problem, span)
    actual = _attend(problem, rule)
    exact = dense_attention(problem, rule, torch.float64)
    eager = dense_attention(problem, rule, dtype)
    assert_no_worse_than_eager(actual, exact, eager, dtype)
    assert len(played.launches) == num_launches


def test_one_kv_head_and_one_token_prompts(played: PlayedFlash) -> None:
    problem = _problem(seq_lens=(60, 3, 1), query_lens=(1, 1, 1), num_kv_heads=1)
    rule = make_rule(problem, Span(5, 12))
    exact = dense_attention(problem, rule, torch.float64)
    eager = dense_attention(problem, rule, torch.float32)
    assert_no_worse_than_eager(_attend(problem, rule), exact, eager, torch.float32)


def test_a_chunk_split_in_two_gives_the_same_as_in_one(played: PlayedFlash) -> None:
    whole = _problem(seq_lens=(60,), query_lens=(60,))
    rule = make_rule(whole, Span(5, 12))
    expected = _attend(whole, rule)
    for first, last in ((0, 14), (14, 30), (30, 60)):
        starts = torch.tensor([0, last - first], dtype=torch.int32)
        batch = replace(
            whole.batch,
            query_start_loc=starts,
            seq_lens=torch.tensor([last], dtype=torch.int32),
            num_tokens=last - first,
            max_query_len=last - first,
            max_seq_len=last,
        )
        chunk = replace(
            whole, batch=batch, query=whole.query[first:last], out=whole.out[first:last]
        )
        torch.testing.assert_close(_attend(chunk, rule), expected[first:last], rtol=0, atol=2e-6)


def test_layers_of_a_step_share_its_cut(
    played: PlayedFlash, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = _problem()
    rule, made = make_rule(problem, Span(5, 12)), []
    real = cuda.NearFar.of
    monkeypatch.setattr(cuda.NearFar, "of", lambda *args: made.append(args) or real(*args))
    flash, out = cuda.FlashAttention(), problem.out.clone()
    for batch in (problem.batch, problem.batch, replace(problem.batch)):
        caches = problem.key_cache, problem.value_cache
        flash.attend(problem.query, *caches, batch, rule, problem.scale, out)
    assert len(made) == 2


def test_a_rule_without_one_window_is_refused_and_never_guessed(played: PlayedFlash) -> None:
    problem = _problem()
    for rule in (
        make_rule(problem, Span(5, 12), per_head=True),
        make_rule(problem, Span(5, 12, 0, 32)),
    ):
        with pytest.raises(ValueError, match="one window for all heads"):
            _attend(problem, rule)


def test_dense_decode_rows(played: PlayedFlash) -> None:
    problem = _problem(seq_lens=(1, 60, 33), query_lens=(1, 1, 1), block_size=16)
    batch = replace(problem.batch, max_seq_len=4096)  # as decode rows come: never the longest
    out = problem.out.clone()
    caches = problem.key_cache, problem.value_cache
    cuda.FlashAttention().decode(problem.query, *caches, batch, problem.scale, out)
    exact = dense_attention(problem, None, torch.float64)
    eager = dense_attention(problem, None, torch.float32)
    assert_no_worse_than_eager(out, exact, eager, torch.float32)
    (launch,) = played.launches
    assert (launch["max_seqlen_q"], launch["max_seqlen_k"]) == (1, 4096)


def test_launches_need_no_value_of_any_tensor(played: PlayedFlash) -> None:
    problem = _problem()
    meta = {
        name: getattr(problem, name).to("meta")
        for name in ("query", "key_cache", "value_cache", "out")
    }
    tensors = ("query_start_loc", "seq_lens", "block_table")
    batch = replace(
        problem.batch, **{name: getattr(problem.batch, name).to("meta") for name in tensors}
    )
    rule = SpanRule.of([Span(5, 12)] * 2, len(SEQ_LENS), torch.device("meta"))
    flash = cuda.FlashAttention()
    flash.attend(*list(meta.values())[:3], batch, rule, 1.0, meta["out"])
    flash.attend(*list(meta.values())[:3], batch, None, 1.0, meta["out"])
    assert len(played.launches) == 4


def _play_cache_writer(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache_dtype: str,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
) -> None:
    """vLLM's kernel as it addresses memory: the key cache's strides serve both caches, and a
    token's heads follow one another.
    """
    _, block_size, num_heads, head_size = key_cache.shape
    assert key_cache.stride(0) == value_cache.stride(0)
    assert (kv_cache_dtype, k_scale.numel(), v_scale.numel()) == ("auto", 1, 1)
    for new, cache in ((key, key_cache), (value, value_cache)):
        seen = cache.as_strided(cache.shape, key_cache.stride(), cache.storage_offset())
        tokens = new.as_strided(
            (len(new), num_heads, head_size), (new.stride(0), head_size, 1), new.storage_offset()
        )
        for token, slot in enumerate(slot_mapping.tolist()):
            if slot >= 0:
                seen[slot // block_size, slot % block_size] = tokens[token]


@pytest.mark.parametrize("num_kv_heads", [1, 3])
@pytest.mark.parametrize("heads_outside", [True, False], ids=["LBHNC", "LBNHC"])
def test_the_engines_cache_writer_writes_what_the_reference_does(
    num_kv_heads: int, heads_outside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm._custom_ops.reshape_and_cache_flash", _play_cache_writer)
    reference = {impl.name: impl.run for impl in cache_writers()}["reference"]
    qkv = torch.randn(7, 3 * num_kv_heads, 16).to(torch.bfloat16)  # as a layer's projection gives
    key, value = qkv[:, num_kv_heads : 2 * num_kv_heads], qkv[:, 2 * num_kv_heads :]
    slots = torch.tensor([5, -1, 40, 41, 0, 63, 17])
    shape = (4, num_kv_heads, 16, 32) if heads_outside else (4, 16, num_kv_heads, 32)
    written = []
    for write in (reference, cuda.write):
        memory = torch.full(shape, torch.nan, dtype=torch.bfloat16)
        cache = memory if heads_outside else memory.transpose(1, 2)
        write(key, value, *kv_views(cache, KVOrder.FUSED), slots)
        written.append(memory)
    assert_bitwise_equal(written[1], written[0])


def _context(**changes: Any) -> OpContext:
    sizes = {"num_blocks": 1, "block_size": 16, "num_kv_heads": 2, "head_size": 128}
    layout = {**sizes, "dtype": torch.bfloat16, "order": KVOrder.FUSED} | changes
    return OpContext(PagedKVLayout(**layout), 8, "cuda", with_rule=False)


def _names(context: OpContext) -> dict[str, str]:
    return dict(pair.split("=") for pair in str(engine_and_our_ops(context, "auto")).split())


def test_on_a_gpu_the_engine_serves_what_it_can_and_triton_the_rest(played: PlayedFlash) -> None:
    ours = dict.fromkeys(("sparse_decode", "anchor_decode", "block_topk"), "triton")
    dense = dict.fromkeys(("cache_write", "paged_attention", "dense_decode"), "engine")
    assert _names(_context()) == ours | dense
    assert set(_names(_context(dtype=torch.float32)).values()) == {"triton"}


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([(Span(4, 64),) * 2], "engine"),
        ([(Span(4, 64),) * 2, (Span(0, 32),) * 2], "engine"),  # each layer has its own
        ([(Span(4, 64), Span(4, 32))], "triton"),
        ([(Span(4, 64),) * 2, (everything(), Span(4, 32))], "triton"),
        ([(Span(4, 64, 0, 16),) * 2], "triton"),
    ],
)
def test_windows_are_flash_attentions_where_the_schedule_makes_them_one_number(
    spans: list[tuple[Span, ...]], expected: str, played: PlayedFlash
) -> None:
    class Spec:
        block_size, num_kv_heads, head_size, dtype = 16, 2, 128, torch.bfloat16

    spec: Any = Spec
    context = op_context(spec, 8, torch.device("cuda"), spans)
    assert _names(context)["paged_attention"] == expected


def test_an_unknown_flash_attention_does_not_merge(
    played: PlayedFlash, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fa_utils, "get_flash_attn_version", lambda **asked: 4)
    ruled = replace(_context(), with_rule=True, has_plain_windows=True)
    assert _names(ruled)["paged_attention"] == "triton"
    assert _names(_context())["paged_attention"] == "engine"


def test_nothing_falls_to_the_reference_on_a_gpu(played: PlayedFlash) -> None:
    with pytest.raises(ConfigError, match=r"no implementation of .*head_size 512 is more than"):
        engine_and_our_ops(_context(head_size=512), "auto")


def _vllm_config(head_size: int, kernel: str = "auto") -> Any:
    """What start-up checks look at."""
    model: Any = type("Model", (), {"enforce_eager": False})()
    model.dtype, model.model, model.max_model_len = torch.bfloat16, "", 4096
    model.get_total_num_hidden_layers = lambda: 2
    model.get_num_kv_heads = model.get_num_attention_heads = lambda parallel: 2
    model.get_head_size = lambda: head_size
    config: Any = type("Config", (), {})()
    config.model_config, config.parallel_config = model, None
    config.additional_config = {"vllm_ext": {"kernel": kernel}}
    config.attention_config = type("A", (), {"backend": type("B", (), {"name": "SPARSE_FULL"})})
    config.cache_config = type("C", (), {"block_size": 16})
    config.scheduler_config = type("S", (), {"max_num_seqs": 8})
    return config


def test_what_no_kernel_serves_is_refused_before_a_model_is_loaded(played: PlayedFlash) -> None:
    assert unserved_reasons(_vllm_config(head_size=128), "cuda") == []
    (reason,) = unserved_reasons(_vllm_config(head_size=512), "cuda")
    assert "heads of 512 in KV blocks of 16 tokens" in reason
    assert "no implementation of" in reason
    assert unserved_reasons(_vllm_config(head_size=512), "cpu") == []


def test_the_reference_is_for_eager_doubts_only(played: PlayedFlash) -> None:
    config = _vllm_config(head_size=128, kernel="reference")
    (reason,) = unserved_reasons(config, "cuda")
    assert "--enforce-eager" in reason
    config.model_config.enforce_eager = True
    assert unserved_reasons(config, "cuda") == []


def test_a_rule_knows_its_window_wherever_it_goes() -> None:
    rule = SpanRule.of([Span(4, 64)] * 2, 3, torch.device("cpu"))
    folded = (fold_rule(rule.rows(1, 3)), fold_prefill_rule(rule.rows(1, 3)))
    for one in (rule, rule.rows(1, 3), *folded):
        assert one is not None
        assert one.span == Span(4, 64)
    assert SpanRule.of([Span(4, 64), Span(4, 32)], 3, torch.device("cpu")).span is None
