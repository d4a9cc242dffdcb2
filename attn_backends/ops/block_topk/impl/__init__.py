"""Implementations of ``block_topk``, private to its ``api.py``."""
