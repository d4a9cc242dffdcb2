"""Non-strict serving: a stock backend whose decode rows are counted as dense.

A method that cannot serve a layer must never go unnoticed: the stock backend is used
under its own name, but its metadata builder counts every decode row with a reason.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backend import CommonAttentionMetadata, subclass_attention_backend

from attn_backends.adapter.counters import RowCounters
from attn_backends.adapter.rows import is_prefilling

if TYPE_CHECKING:
    from vllm.config import VllmConfig

REASON = "unsupported"


def counted_dense(stock_path: str, method_name: str) -> str:
    """Class path of a subclass of the stock backend that counts its decode rows.

    Args:
        stock_path: class path of the stock backend.
        method_name: the method that was asked for, the metrics label.
    """
    stock: Any = resolve_obj_by_qualname(stock_path)
    class_name = f"Counted{stock.__name__}"
    if class_name not in globals():
        builder = _counting_builder(stock.get_builder_cls(), method_name)
        backend = subclass_attention_backend("Counted", stock, builder)
        backend.__module__ = __name__
        globals()[class_name] = backend
    return f"{__name__}.{class_name}"


def _counting_builder(stock_builder: Any, method_name: str) -> Any:
    class CountingBuilder(stock_builder):  # type: ignore[misc]
        def __init__(
            self, spec: Any, layer_names: list[str], vllm_config: VllmConfig, *args: Any
        ) -> None:
            super().__init__(spec, layer_names, vllm_config, *args)
            # Every rank and every KV group serves the same rows: one of them counts.
            layers = get_layers_from_vllm_config(vllm_config, Attention)
            first = min(extract_layer_index(name) for name in layers)
            is_first = first in {extract_layer_index(name) for name in layer_names}
            is_counting = is_first and vllm_config.parallel_config.rank == 0
            self._row_counters = RowCounters(method_name) if is_counting else None

        def build(
            self,
            common_prefix_len: int,
            common_attn_metadata: CommonAttentionMetadata,
            fast_build: bool = False,
        ) -> Any:
            if self._row_counters is not None:
                common = common_attn_metadata
                starts = common.query_start_loc_cpu
                is_decode = (starts[1:] - starts[:-1] == 1) & ~is_prefilling(common)
                self._row_counters.add({("dense", REASON): int(is_decode.sum())})
            return super().build(common_prefix_len, common_attn_metadata, fast_build)

        def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Any:
            counters, self._row_counters = self._row_counters, None  # nobody's rows
            try:
                return super().build_for_cudagraph_capture(common_attn_metadata)
            finally:
                self._row_counters = counters

    return CountingBuilder
