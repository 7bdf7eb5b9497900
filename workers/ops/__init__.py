"""Fused operations around attention and the matrix products: a Triton kernel and a plain torch twin of each.

A function runs its kernel on tensors of a GPU and its twin (`..._torch`) on all others. Both round once, at the end:
whatever the dtype, the arithmetic in between is float32. What a kernel writes for a row or a token depends on that row
alone, bit for bit, whatever else is in the batch. None waits for the device, so all can be captured in a CUDA graph,
after one call of the same shapes that compiles. For one model a kernel is compiled in at most a few variants (for few
tokens and for many), never anew for each number of tokens.
"""
