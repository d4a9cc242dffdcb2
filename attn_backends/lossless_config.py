"""The setting of methods whose sparse rows may draft for stock's answers (docs/adr/0012)."""

from __future__ import annotations

from dataclasses import dataclass

from attn_backends.config import EngineFacts, MethodConfig, SettingError, between

MAX_DRAFTS = 64  # tokens of a step: far above what pays


@dataclass(frozen=True)
class LosslessConfig(MethodConfig):
    """Settings of methods that choose what one query reads, and so can draft.

    Attributes:
        lossless_tokens: tokens that a step drafts through the method's sparse rows before one dense
            pass verifies them, so that answers are stock vLLM's; 0 serves the sparse rows.

    Raises:
        SettingError: a value out of its range, or dense service by whatever else is there.
    """

    lossless_tokens: int = between(0, MAX_DRAFTS, unit="tokens", default=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.is_lossless and not self.strict:
            raise SettingError(
                "strict",
                f"is off, but lossless_tokens is {self.lossless_tokens}: what cannot draft would "
                "be served dense at the price of drafts; drop one of them",
            )

    @property
    def is_lossless(self) -> bool:
        """Whether sparse rows only draft."""
        return self.lossless_tokens > 0

    @property
    def draft_tokens(self) -> int:
        """See ``MethodConfig.draft_tokens``."""
        return self.lossless_tokens

    def check(self, engine: EngineFacts) -> None:
        """See ``MethodConfig.check``."""
        super().check(engine)
        if self.is_lossless and engine.num_workers > 1:
            raise SettingError(
                "lossless_tokens",
                f"is {self.lossless_tokens}, but drafts have not been tried with "
                f"{engine.num_workers} workers of a replica; set it to 0, or use one",
            )

    def refuse_with_drafts(self, setting: str, wanted: str) -> None:
        """Refuses a setting that drafts would not honour.

        Args:
            setting: its name.
            wanted: what it must be instead.

        Raises:
            SettingError: names both settings.
        """
        if self.is_lossless:
            raise SettingError(
                setting,
                f"is {getattr(self, setting)!r}, but lossless_tokens is {self.lossless_tokens}, "
                f"and drafts are verified densely; set {setting} to {wanted}, or lossless_tokens "
                "to 0",
            )
