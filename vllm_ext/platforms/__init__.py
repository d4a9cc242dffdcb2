"""Subclasses of vLLM's builtin platforms that honour our backend names."""
