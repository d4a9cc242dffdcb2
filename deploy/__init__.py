"""Deployment: how it is served, watched, measured under load, and broken on purpose."""
