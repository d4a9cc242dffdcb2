"""Prefix-affinity routing that survives prompts without text.

Ray's router divides by the length of a prompt's text; of token ids and of empty prompts it sees
none, and such a request then waits for ever (ray-project/ray#64573, open in 2.60).
"""

from __future__ import annotations

from typing import Any

from ray.serve.llm.request_router import PrefixCacheAffinityRouter


def prefix_text(prompt: Any) -> str | None:
    """What the prefix tree compares of a prompt of token ids; None for other prompts.

    Args:
        prompt: a completion request's; of several prompts the first decides.
    """
    ids = prompt[0] if isinstance(prompt, list) and prompt else None
    ids = ids if isinstance(ids, list) else prompt
    if isinstance(ids, list) and ids and isinstance(ids[0], int):
        return " ".join(map(str, ids))
    return None


class PrefixRouter(PrefixCacheAffinityRouter):
    """Ray's router; token ids have prefixes too, and what has none is routed by queue length."""

    def _extract_text_from_request(self, pending_request: Any) -> str | None:
        for argument in pending_request.args:
            if text := prefix_text(getattr(argument, "prompt", None)):
                return text
        try:
            return super()._extract_text_from_request(pending_request) or None
        except ValueError:  # neither prompt nor messages, as with prompt embeddings
            return None
