"""Copies between the host and a GPU through pinned memory: nobody waits for the device. On a CPU there are none.

PyTorch keeps pinned memory that a copy still reads or writes out of use until the copy is done (its caching host
allocator records an event for each), so nothing here has to be kept alive.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt
import torch

_ALIGNMENT = 256
"""Bytes at whose multiples tensors begin on a GPU: kernels are compiled once more for whatever begins elsewhere."""


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor on `device`, for what is queued on its current stream from now on."""
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def to_device_together(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """As `to_device` for several contiguous tensors, in one copy; they share memory there."""
    if device.type != "cuda":
        return list(tensors)
    begins, size = [], 0
    for tensor in tensors:
        begins.append(size)
        size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    packed = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    for tensor, part in zip(tensors, _cut(packed, tensors, begins), strict=True):
        part.copy_(tensor)
    return _cut(packed.to(device, non_blocking=True), tensors, begins)


def _cut(packed: torch.Tensor, tensors: Sequence[torch.Tensor], begins: Sequence[int]) -> list[torch.Tensor]:
    """Views of `packed`, bytes, shaped as these tensors, which begin there."""
    return [
        packed[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for tensor, begin in zip(tensors, begins, strict=True)
    ]


class HostCopy:
    """The values that a tensor has at this point of the current stream, on their way to the host.

    Args:
        tensor: may be overwritten by whatever is queued later.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._host = tensor.clone()

    def tolist(self) -> list[Any]:
        """The values, nested as the tensor is; waits for this copy, and for nothing that was queued after it."""
        values: list[Any] = self.numpy().tolist()
        return values

    def numpy(self) -> npt.NDArray[Any]:
        """The values, which are this copy's own; waits as `tolist` does."""
        if self._arrived is not None:
            self._arrived.synchronize()
        values: npt.NDArray[Any] = self._host.numpy()
        return values
