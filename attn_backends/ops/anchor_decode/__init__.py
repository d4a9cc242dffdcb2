"""The ``anchor_decode`` op; see ``api.py``."""
