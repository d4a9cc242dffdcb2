"""Load test: vLLM's own serving benchmark over a grid, side by side for several servers."""
