"""Moving KV cache blocks between workers: layouts, handoffs, connectors."""
