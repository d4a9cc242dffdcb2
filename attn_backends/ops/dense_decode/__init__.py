"""The ``dense_decode`` op; see ``api.py``."""
