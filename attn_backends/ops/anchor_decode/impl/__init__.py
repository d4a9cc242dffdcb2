"""Implementations of ``anchor_decode``, private to its ``api.py``."""
