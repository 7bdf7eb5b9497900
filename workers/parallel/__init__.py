"""One worker on several devices: tensor parallelism."""
