"""Deployment: the Ray Serve application, a soak, and what clients see of faults."""
