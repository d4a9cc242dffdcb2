"""What our subclass of a builtin platform adds, the same for CPU and CUDA."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attn_backends.methods import REGISTRY

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class ExtPlatformMixin:
    """Put before a builtin ``Platform`` in the bases."""

    device_type: str

    @classmethod
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        """Our backend where it was chosen (and can serve), else the builtin's choice.

        Raises:
            ConfigError: the chosen method cannot serve a layer, and ``strict`` is on.
        """
        name = getattr(selected_backend, "name", None)
        builtin: Any = super()
        if name not in REGISTRY:
            path: str = builtin.get_attn_backend_cls(
                selected_backend, attn_selector_config, num_heads
            )
            return path
        from vllm_ext.platforms.selection import select_backend

        return select_backend(
            name,
            attn_selector_config,
            lambda: builtin.get_attn_backend_cls(None, attn_selector_config, num_heads),
        )

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """The builtin's updates, then our start-up checks.

        Raises:
            ConfigError: settings that cannot be honoured.
        """
        builtin: Any = super()
        builtin.check_and_update_config(vllm_config)
        from vllm_ext.platforms.selection import prepare_config

        prepare_config(vllm_config, cls.device_type)

    @classmethod
    def validate_request(cls, processed_inputs: Any, params: Any) -> None:
        """The builtin's check, then our per-request options.

        Raises:
            VLLMValidationError: ``vllm_xargs`` that cannot be honoured; a 400.
        """
        builtin: Any = super()
        builtin.validate_request(processed_inputs, params)
        from vllm_ext.platforms.selection import check_request

        check_request(getattr(params, "extra_args", None))

    @classmethod
    def register_custom_kv_cache_specs(cls, vllm_config: VllmConfig) -> None:
        """vLLM's hook: our KV cache specs and their managers, in every process."""
        builtin: Any = super()
        builtin.register_custom_kv_cache_specs(vllm_config)
        from kvcache.adapter.managers import register

        register()
