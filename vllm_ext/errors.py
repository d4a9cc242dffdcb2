"""Errors that users cause and can mend."""

from __future__ import annotations


class UserError(Exception):
    """Bad input; the message says what it was and what would work."""
