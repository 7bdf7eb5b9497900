"""The connector over NVIDIA NIXL."""
