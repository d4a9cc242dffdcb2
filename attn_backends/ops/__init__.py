"""The math: one folder per op, ``api.py`` in front of interchangeable implementations."""
