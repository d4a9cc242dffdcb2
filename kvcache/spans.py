"""How much of the past a query sees, as a function of its position.

One rule serves kernels, selection, retention, admission and prefix hits, so that what is freed is
what no later query reads. It depends on the position alone: chunking, prefix hits and preemption
cannot change it. Elastic rules are MoA's (arXiv 2406.14909); there a prompt's final length counts
for all its queries, which no prefix cache allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

BETA_UNIT = 64  # beta is counted in 64ths: whole numbers, the same on every device
MAX_ALPHA_TOKENS = 1 << 20


@dataclass(frozen=True)
class Span:
    """The first tokens, and the last ``span(p)`` before and at the query's position ``p``.

    Token ``t <= p`` is seen iff ``t < sink_tokens`` or ``t > p - span(p)``, where
    ``span(p) = max(floor_tokens, alpha_tokens + beta_64ths * (p + 1) // 64)``. Since beta is at
    most 1, the span grows by at most one token per position: what falls out of it stays out.

    Attributes:
        sink_tokens: 0 or more.
        floor_tokens: the least span, the query's own token included; 1 or more.
        alpha_tokens: may be negative.
        beta_64ths: 0 (a plain window of ``floor_tokens``) to 64.

    Raises:
        ValueError: a value out of its range.
    """

    sink_tokens: int
    floor_tokens: int
    alpha_tokens: int = 0
    beta_64ths: int = 0

    def __post_init__(self) -> None:
        bounds = (
            ("sink_tokens", 0, MAX_ALPHA_TOKENS),
            ("floor_tokens", 1, 1 << 30),
            ("alpha_tokens", -MAX_ALPHA_TOKENS, MAX_ALPHA_TOKENS),
            ("beta_64ths", 0, BETA_UNIT),
        )
        for field, lowest, highest in bounds:
            value = getattr(self, field)
            if not lowest <= value <= highest:
                raise ValueError(f"{field} is {value}; it must be between {lowest} and {highest}")

    def __str__(self) -> str:
        """As metrics label it: equal texts mean equal spans."""
        text = f"sink{self.sink_tokens}-window{self.floor_tokens}"
        if not self.alpha_tokens and not self.beta_64ths:
            return text
        return f"{text}-alpha{self.alpha_tokens}-beta{self.beta_64ths}"

    def tokens(self, num_tokens: int) -> int:
        """The span of the last of ``num_tokens`` tokens (position ``num_tokens - 1``)."""
        elastic = self.alpha_tokens + self.beta_64ths * num_tokens // BETA_UNIT
        return max(self.floor_tokens, elastic)

    @property
    def window_tokens(self) -> int | None:
        """The span where it is the same at every position; None where it grows."""
        return None if self.beta_64ths else self.tokens(0)

    def first_seen(self, num_tokens: int) -> int:
        """The first token, sinks apart, that the last of ``num_tokens`` tokens sees; it never
        falls as tokens are added.
        """
        return max(0, num_tokens - self.tokens(num_tokens))

    def sees_everything(self, num_tokens: int) -> bool:
        """Whether the last of ``num_tokens`` tokens, and so every one before it, sees all that
        stand before it.
        """
        return self.first_seen(num_tokens) <= self.sink_tokens

    @property
    def hides_nothing(self) -> bool:
        """Whether no query, at whatever position, has something hidden from it."""
        grows = self.beta_64ths == BETA_UNIT and self.alpha_tokens + self.sink_tokens >= 0
        return grows or self.floor_tokens >= EVERYTHING_TOKENS

    @property
    def simplest(self) -> Span:
        """This span, or ``everything()`` where it hides nothing: equal rules must be equal."""
        return everything() if self.hides_nothing else self


EVERYTHING_TOKENS = 1 << 30


def everything() -> Span:
    """The span that hides nothing."""
    return Span(0, EVERYTHING_TOKENS)


def covering(spans: Sequence[Span], max_tokens: int) -> Span:
    """The least span, on average over all lengths, that shows what any of these shows.

    Args:
        spans: one or more.
        max_tokens: it need not cover more beyond.
    """
    if any(span.hides_nothing for span in spans):
        return everything()
    sinks = max(span.sink_tokens for span in spans)
    floor = max(span.floor_tokens for span in spans)
    candidates = [
        Span(sinks, floor, _alpha_above(spans, beta, max_tokens), beta)
        for beta in {span.beta_64ths for span in spans}
    ]
    lengths = range(0, max_tokens + 1, max(1, max_tokens // 64))
    return min(candidates, key=lambda span: sum(min(n, span.tokens(n)) for n in lengths))


def _alpha_above(spans: Sequence[Span], beta_64ths: int, max_tokens: int) -> int:
    """The least alpha with which this slope is nowhere below any of the spans' elastic part."""
    # Lines differ most at an end; floors of two quotients by no more than their difference, rounded
    # up.
    return max(
        span.alpha_tokens + max(0, -(-(span.beta_64ths - beta_64ths) * max_tokens // BETA_UNIT))
        for span in spans
    )
