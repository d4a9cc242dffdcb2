"""Implementations of ``cache_write``, private to its ``api.py``."""
