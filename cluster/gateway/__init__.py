"""A request's life at the gateway: admission, attempts, text."""
