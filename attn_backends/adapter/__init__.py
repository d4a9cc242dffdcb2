"""The only place of this package that knows vLLM (0.32, V1 engine)."""
