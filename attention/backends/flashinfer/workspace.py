"""Device memory that FlashInfer's kernels scribble in: one of each kind for all builders of a process."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

_SCRATCH_BYTES = 256 << 20
_SEMAPHORE_BYTES = 8 << 20


@dataclass(frozen=True)
class Workspace:
    """What layers of all kinds share on one device, because they run one after the other on its stream.

    Attributes:
        scratch: uint8, partial results of one call.
        semaphores: int32, zeros between calls: XQA's kernels leave them as they found them.
    """

    scratch: torch.Tensor
    semaphores: torch.Tensor


@functools.cache
def device_workspace(device: torch.device) -> Workspace:
    """The workspace of a device, made at the first call."""
    return Workspace(
        scratch=torch.zeros(_SCRATCH_BYTES, dtype=torch.uint8, device=device),
        semaphores=torch.zeros(_SEMAPHORE_BYTES // 4, dtype=torch.int32, device=device),
    )
