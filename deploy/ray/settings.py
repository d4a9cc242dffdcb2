"""Checks of a Ray Serve LLM application's settings; needs neither Ray nor vLLM.

The block that chooses a method is the same for every target (``deploy/ray/*.yaml``), and
the same as ``--attention-backend`` and ``--additional-config`` of a plain server:

    engine_kwargs:
      attention_backend: TIDAL_DECODE
      additional_config: {vllm_ext: {budget_tokens: 512}}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from vllm_ext.errors import UserError
from vllm_ext.methods import REGISTRY, check_settings, speculation


def check_engine_kwargs(model_id: str, engine_kwargs: Mapping[str, Any]) -> None:
    """Refuses what would not be served by a method of ours, before any replica starts.

    Args:
        model_id: for the message.
        engine_kwargs: of one entry of ``llm_configs``.

    Raises:
        UserError: no method of ours is named, its settings are no object, or vLLM is not told of
            drafts.
        ConfigError: a setting that cannot be honoured.
    """
    name = engine_kwargs.get("attention_backend")
    if not isinstance(name, str) or name.upper() not in REGISTRY:
        raise UserError(
            f"llm_configs entry {model_id!r}: engine_kwargs.attention_backend is {name!r}; this "
            f"application serves {', '.join(REGISTRY)} (stock vLLM: import_path "
            "ray.serve.llm:build_openai_app)"
        )
    additional = engine_kwargs.get("additional_config") or {}
    if not isinstance(additional, Mapping):
        raise UserError(
            f"llm_configs entry {model_id!r}: engine_kwargs.additional_config must be an object, "
            f"got {additional!r}"
        )
    settings = additional.get("vllm_ext") or {}
    check_settings(name.upper(), settings)
    drafting = speculation(name.upper(), settings, "MODEL")
    if drafting is not None and not engine_kwargs.get("speculative_config"):
        raise UserError(
            f"llm_configs entry {model_id!r}: lossless_tokens needs "
            f"engine_kwargs.speculative_config {json.dumps(drafting)}, MODEL being the entry's own "
            "model_source"
        )
