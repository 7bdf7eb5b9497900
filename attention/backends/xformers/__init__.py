"""XFORMERS: memory-efficient attention."""
