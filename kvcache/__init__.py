"""Which KV blocks a request keeps, and how a block is laid out in memory."""
