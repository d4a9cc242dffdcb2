"""Which of the kept KV blocks a layer reads in a decode step, and the math."""
