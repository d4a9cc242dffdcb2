"""Implementations of ``paged_attention``, private to its ``api.py``."""
