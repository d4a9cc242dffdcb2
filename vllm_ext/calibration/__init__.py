"""Finds anchor layers and head maps on the user's own checkpoint, and proves them end to end."""
