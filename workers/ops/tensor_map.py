"""What a tensor map can describe: how Hopper's tensor memory accelerator (TMA) is told what to read."""

from __future__ import annotations

import torch

ALIGNMENT = 16
"""Bytes that the address and the strides are multiples of (CUDA driver API, `cuTensorMapEncodeTiled`)."""

_DTYPES = (torch.bfloat16, torch.float16)
"""That the kernels with such maps multiply."""


def has_tensor_map(tensor: torch.Tensor) -> bool:
    """Whether a map can describe the tensor: not empty, in 16 bits, rows contiguous, and all of them aligned.

    Sizes need not be multiples of a tile: what lies beyond is read as zero.
    """
    strides = [stride * tensor.element_size() for stride in tensor.stride()[:-1]]
    aligned = tensor.data_ptr() % ALIGNMENT == 0 and all(stride % ALIGNMENT == 0 for stride in strides)
    return aligned and tensor.stride(-1) == 1 and tensor.dtype in _DTYPES and tensor.numel() > 0
