"""The ``cache_write`` op; see ``api.py``."""
