"""JAX's two Pallas kernels for TPUs on torch tensors: through torch_xla on a TPU, through the interpreter on a CPU."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch

from attention.backends.common.libraries import load_library
from attention.errors import AttentionInputError
from attention.selection.forced import Forced

_INTERPRET = Forced[bool]()


@contextmanager
def interpret_on_cpu() -> Iterator[None]:
    """Let PALLAS take CPU tensors inside this block, through Pallas' TPU interpreter. For tests."""
    with _INTERPRET.force(True):
        yield


class PallasKernels(ABC):
    """The two kernels on torch tensors."""

    @abstractmethod
    def flash(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        """Causal attention: (1, Hq, S, D) each, to (1, Hq, S, D)."""

    @abstractmethod
    def paged(
        self,
        query: torch.Tensor,
        key_pages: torch.Tensor,
        value_pages: torch.Tensor,
        lengths: torch.Tensor,
        page_indices: torch.Tensor,
        pages_per_compute_block: int,
    ) -> torch.Tensor:
        """One query, already scaled, of each sequence: (B, Hq, D) over pages (Hkv, pages, page_size, D)."""


class XlaKernels(PallasKernels):
    """On a TPU: torch_xla lowers the kernels into the XLA program that the tensors belong to.

    Raises:
        AttentionBackendError: torch_xla is missing.
    """

    def __init__(self) -> None:
        self._kernels: Any = load_library("torch_xla", "PALLAS", "torch_xla.experimental.custom_kernel")

    def flash(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        """See `PallasKernels.flash`."""
        return cast(torch.Tensor, self._kernels.flash_attention(query, key, value, causal=True, sm_scale=scale))

    def paged(
        self,
        query: torch.Tensor,
        key_pages: torch.Tensor,
        value_pages: torch.Tensor,
        lengths: torch.Tensor,
        page_indices: torch.Tensor,
        pages_per_compute_block: int,
    ) -> torch.Tensor:
        """See `PallasKernels.paged`."""
        attended = self._kernels.paged_attention(
            query, key_pages, value_pages, lengths, page_indices, pages_per_compute_block
        )
        return cast(torch.Tensor, attended)


class InterpretedKernels(PallasKernels):
    """On CPU tensors: the kernels in Pallas' TPU interpreter.

    Raises:
        AttentionBackendError: JAX is missing.
    """

    def __init__(self) -> None:
        ops = "jax.experimental.pallas.ops.tpu"
        self._flash: Any = load_library("jax", "PALLAS", f"{ops}.flash_attention").flash_attention
        self._paged: Any = load_library("jax", "PALLAS", f"{ops}.paged_attention").paged_attention
        self._tpu: Any = load_library("jax", "PALLAS", "jax.experimental.pallas.tpu")
        self._dlpack: Any = load_library("jax", "PALLAS", "jax.dlpack")

    def flash(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        """See `PallasKernels.flash`."""
        arrays = [self._to_jax(tensor) for tensor in (query, key, value)]
        with self._tpu.force_tpu_interpret_mode():
            return self._to_torch(self._flash(*arrays, causal=True, sm_scale=scale))

    def paged(
        self,
        query: torch.Tensor,
        key_pages: torch.Tensor,
        value_pages: torch.Tensor,
        lengths: torch.Tensor,
        page_indices: torch.Tensor,
        pages_per_compute_block: int,
    ) -> torch.Tensor:
        """See `PallasKernels.paged`."""
        arrays = [self._to_jax(tensor) for tensor in (query, key_pages, value_pages, lengths, page_indices)]
        with self._tpu.force_tpu_interpret_mode():
            return self._to_torch(self._paged(*arrays, pages_per_compute_block=pages_per_compute_block))

    def _to_jax(self, tensor: torch.Tensor) -> Any:
        return self._dlpack.from_dlpack(tensor.detach().contiguous())

    @staticmethod
    def _to_torch(array: Any) -> torch.Tensor:
        return torch.utils.dlpack.from_dlpack(array.block_until_ready()).clone()


def kernels_for(device: torch.device) -> PallasKernels:
    """The kernels for tensors of a device.

    Raises:
        AttentionInputError: neither an XLA device nor, under `interpret_on_cpu()`, the CPU.
        AttentionBackendError: the library is missing.
    """
    if device.type == "xla":
        return XlaKernels()
    if device.type == "cpu" and _INTERPRET.values():
        return InterpretedKernels()
    raise AttentionInputError(f"PALLAS runs on TPUs, not on {device.type} tensors")
