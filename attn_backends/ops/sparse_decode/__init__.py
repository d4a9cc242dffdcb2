"""The ``sparse_decode`` op; see ``api.py``."""
