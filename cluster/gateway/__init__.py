"""A request's life at the gateway: admission, placement, attempts."""
