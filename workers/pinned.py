"""Copies between the host and a GPU through pinned memory: nobody waits for the device. On a CPU there are none.

PyTorch keeps pinned memory that a copy still reads or writes out of use until the copy is done (its caching host
allocator records an event for each), so nothing here has to be kept alive.
"""

from __future__ import annotations

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor on `device`, for what is queued on its current stream from now on."""
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


class HostCopy:
    """The values that a tensor of integers has at this point of the current stream, on their way to the host.

    Args:
        tensor: one-dimensional; may be overwritten by whatever is queued later.
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

    def tolist(self) -> list[int]:
        """The values; waits for this copy, and for nothing that was queued after it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        values: list[int] = self._host.tolist()
        return values
