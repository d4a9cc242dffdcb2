"""Errors that users cause and can mend."""

from __future__ import annotations

from attn_backends.config import ConfigError

__all__ = ["ConfigError", "UserError"]  # whoever is above this package finds both here


class UserError(Exception):
    """Bad input; the message says what it was and what would work."""
