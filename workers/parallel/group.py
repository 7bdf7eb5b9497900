"""The ranks of one worker and what they do together (tensor parallelism; Shoeybi et al., 2019, arXiv:1909.08053).

Every rank is a process of its own on one host. All of them must make the same calls in the same order; a call that a
rank leaves out makes the others wait.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from workers.parallel.errors import TensorParallelError
from workers.parallel.rendezvous import hold_address, meet

__all__ = ["COLLECTIVE_TIMEOUT_S", "SINGLE", "TensorParallelGroup", "hold_address", "join_group"]

_T = TypeVar("_T")

# Newer releases of torch have renamed it, and older ones have only this name.
_gather: Callable[..., object] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

COLLECTIVE_TIMEOUT_S = 600.0
"""Seconds that a rank waits in a collective for the others, once all have joined: the slowest may still load."""


class TensorParallelGroup:
    """One rank's place among the ranks of its worker. Made by `join_group` or `single`.

    Collectives belong to one thread at a time. Sums are the same bit for bit on every rank: one rank's result goes to
    all of them.

    Attributes:
        rank: 0 to size - 1.
        size: ranks; with 1 every collective is free of charge and nothing of torch.distributed is touched.
        device: where the tensors of `all_reduce` and `all_gather` are.
    """

    def __init__(self, rank: int, size: int, device: torch.device, host: dist.ProcessGroup | None = None) -> None:
        self.rank = rank
        self.size = size
        self.device = device
        self._host = host

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> TensorParallelGroup:
        """A worker of one rank."""
        return cls(0, 1, torch.device(device))

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum `x`, contiguous and of one shape and dtype, over the ranks, in place; on a GPU a graph can capture it.

        Returns:
            `x`.

        Raises:
            TensorParallelError: a rank is lost. (On a GPU the device finds that out later than this call.)
        """
        if self.size > 1:
            self._call("all_reduce", lambda: dist.all_reduce(x))
        return x

    def all_gather(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """The ranks' `x` beside each other in order of rank; on a GPU a graph can capture it.

        Args:
            x: (N, n), contiguous, of one shape and dtype on all ranks.
            out: (N, size * n), contiguous, of x's dtype: where to write. None: a new tensor.

        Returns:
            (N, size * n), contiguous; `x` itself with one rank and no `out`.

        Raises:
            TensorParallelError: as `all_reduce`.
        """
        if self.size == 1:
            return x if out is None else out.copy_(x)
        rows, columns = x.shape
        parts = self.all_gather_parts(x)
        result = x.new_empty(rows, self.size * columns) if out is None else out
        result.view(rows, self.size, columns).copy_(parts.transpose(0, 1))
        return result

    def all_gather_parts(self, x: torch.Tensor) -> torch.Tensor:
        """The ranks' `x` one after the other, in order of rank; on a GPU a graph can capture it.

        Args:
            x: (N, ...), contiguous, of one shape and dtype on all ranks.

        Returns:
            (size, N, ...), contiguous.

        Raises:
            TensorParallelError: as `all_reduce`.
        """
        if self.size == 1:
            return x[None]
        parts = x.new_empty(self.size, *x.shape)
        self._call("all_gather", lambda: _gather(parts.flatten(0, 1), x))
        return parts

    def agree_min(self, value: int) -> int:
        """The smallest of the ranks' values, such as the KV blocks that each has room for. Waits for all of them.

        Raises:
            TensorParallelError: a rank is lost, or does not come within `COLLECTIVE_TIMEOUT_S`.
        """
        if self.size == 1:
            return value
        smallest = torch.tensor([value], dtype=torch.int64)
        self._call("agree_min", lambda: dist.all_reduce(smallest, dist.ReduceOp.MIN, group=self._host))
        return int(smallest.item())

    def barrier(self) -> None:
        """Wait on the host until every rank is here; says nothing of what their devices still do.

        Raises:
            TensorParallelError: as `agree_min`.
        """
        self.agree_min(0)

    def close(self) -> None:
        """Leave; all ranks do so together. A second call does nothing.

        CUDA graphs that hold collectives must be gone before: NCCL waits for them. Where a rank was lost, or a graph
        may be left, end the process in place of this.
        """
        if self._host is not None:
            self._host = None
            dist.destroy_process_group()

    def _call(self, name: str, collective: Callable[[], _T]) -> _T:
        try:
            return collective()
        except RuntimeError as error:
            raise TensorParallelError(f"rank {self.rank} of {self.size}: {name} failed: {error}") from error


SINGLE = TensorParallelGroup.single()
"""The group of a worker that has one rank, on any device."""


def join_group(
    rank: int,
    size: int,
    address: str,
    device: torch.device | str,
    timeout_s: float = 60.0,
    held: socket.socket | None = None,
) -> TensorParallelGroup:
    """Meet the other ranks of a worker: NCCL between GPUs, gloo between CPUs and for `agree_min`.

    A process can be in one group. Rank 0 listens at `address`; everything listens on loopback, so that all ranks are
    on one host.

    Args:
        rank: this one, 0 to size - 1.
        size: ranks; with 1 nobody is met.
        address: tcp://host:port on loopback, the same for all ranks, see `hold_address`.
        device: this rank's, such as "cpu" or "cuda:1".
        timeout_s: seconds until all ranks must be here.
        held: rank 0's socket, which holds the address until then; the group's from now on.

    Raises:
        ValueError: a rank or an address that makes no sense, or rank 0 without the socket.
        TensorParallelError: a rank did not come in time, or came twice.
    """
    device = torch.device(device)
    if not 0 <= rank < size:
        raise ValueError(f"rank {rank} of {size} ranks: must be 0 to {size - 1}")
    if size == 1:
        return TensorParallelGroup.single(device)
    if dist.is_initialized():
        raise TensorParallelError(f"rank {rank} of {size}: this process is in a group already")
    store = meet(rank, size, address, timeout_s, held)
    interface = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = interface
    on_gpu = device.type == "cuda"
    if device.index is not None and on_gpu:
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
            device_id=torch.device("cuda", torch.cuda.current_device()) if on_gpu else None,
        )
        host = dist.new_group(backend="gloo", timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S))
    except RuntimeError as error:
        if dist.is_initialized():
            dist.destroy_process_group()
        raise TensorParallelError(f"rank {rank} of {size}: the group cannot be made: {error}") from error
    assert isinstance(host, dist.ProcessGroup)
    return TensorParallelGroup(rank, size, device, host)
