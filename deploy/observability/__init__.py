"""Prometheus configuration, a Grafana dashboard, and a preview of it without Grafana."""
