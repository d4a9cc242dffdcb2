"""Deployment: Ray Serve application, load test, observability. Empty until step 4."""
