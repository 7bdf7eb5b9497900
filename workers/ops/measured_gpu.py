"""The GPUs that the tables of measured kernels hold for: Hopper with as many multiprocessors as an H200."""

from __future__ import annotations

import functools

import torch

_NUM_SMS = 132
"""Most of what is in the tables has one program for each multiprocessor."""


@functools.cache
def is_measured(device: torch.device) -> bool:
    """Whether a device is such a GPU."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor, properties.multi_processor_count) == (9, 0, _NUM_SMS)
