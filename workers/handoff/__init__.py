"""Where a worker meets the connector: what prefill sends, what decode receives."""
