"""Whether an operation runs as a Triton kernel or as its twin in plain torch."""

from __future__ import annotations

import functools
import importlib.util

import torch


def uses_triton(tensor: torch.Tensor) -> bool:
    """Whether operations on this tensor run as Triton kernels: on a GPU, and on the CPU in Triton's interpreter."""
    return _has_triton() and (tensor.device.type != "cpu" or _interpreted())


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _interpreted() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)
