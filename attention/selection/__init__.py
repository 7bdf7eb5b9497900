"""The choice of a backend: what this device is, what each backend can do there, which is fastest."""
