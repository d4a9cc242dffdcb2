"""vllm-ext: cheap long-context decoding on ordinary checkpoints, as a vLLM plugin."""

__version__ = "0.1.0"
