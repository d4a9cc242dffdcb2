"""Benchmarks as commands: both sides alternate in one run, medians with spread."""
