"""Implementations of ``sparse_decode``, private to its ``api.py``."""
