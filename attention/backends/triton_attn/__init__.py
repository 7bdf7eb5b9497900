"""TRITON_ATTN: Baton's own kernels."""
