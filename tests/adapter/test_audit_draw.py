"""Which decode steps are audited."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from attn_backends.adapter.audit import with_audit


class _Runner:
    """In place of vLLM's model runner."""


@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 1.0])
def test_the_share_is_kept_and_no_period_is(share: float) -> None:
    runner = _Runner()
    with_audit(runner, share, "TIDAL_DECODE")
    audited = [step for step in range(2000) if runner._is_drawn()]  # type: ignore[attr-defined]
    assert abs(len(audited) - 2000 * share) <= 1
    assert {step % 4 for step in audited} == {0, 1, 2, 3}
