"""The ``paged_attention`` op; see ``api.py``."""
