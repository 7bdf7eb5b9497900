"""FLEX_ATTENTION: PyTorch's compiled attention with block masks."""
