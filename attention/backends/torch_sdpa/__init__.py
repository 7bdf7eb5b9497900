"""TORCH_SDPA and CPU_ATTN: PyTorch's scaled dot product attention over a paged cache."""
