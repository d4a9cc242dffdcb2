"""The ``block_topk`` op; see ``api.py``."""
