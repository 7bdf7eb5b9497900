"""How two workers meet: real data, once, which also measures the link."""
