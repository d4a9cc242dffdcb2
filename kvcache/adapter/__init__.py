"""vLLM's side of retention: KV cache specs and their managers."""
