"""Runs work on the ranks of a tensor-parallel group, each in a process of its own."""

from __future__ import annotations

import pickle
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from forked import FORKED
from workers.parallel.group import TensorParallelGroup, hold_address, join_group

Work = Callable[..., Any]
"""A function of a module that can be imported; called with the group and what was given beside."""


def run_ranks(
    size: int, work: Work, *args: Any, device: str = "cpu", timeout_s: float = 90.0, may_die: int | None = None
) -> list[Any]:
    """`work(group, *args)` on each of `size` ranks; the results in order of rank, None of one that may die and did.

    Raises:
        AssertionError: a rank raised (its traceback is the message), ended without a result, or took too long.
    """
    address, held = hold_address()
    ends: dict[Connection, int] = {}
    processes = []
    for rank in range(size):
        ours, theirs = FORKED.Pipe(duplex=False)
        place = (address, held if rank == 0 else None)
        process = FORKED.Process(target=_run, args=(theirs, rank, size, place, device, work, args), daemon=True)
        process.start()
        theirs.close()
        ends[ours] = rank
        processes.append(process)
    held.close()
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    try:
        while len(results) < size:
            ready = wait(
                [end for end, rank in ends.items() if rank not in results], max(0, deadline - time.monotonic())
            )
            assert ready, f"ranks {sorted(set(range(size)) - set(results))} took more than {timeout_s} s"
            for end in ready:
                assert isinstance(end, Connection)
                results[ends[end]] = _result(end, ends[end], may_die)
    finally:
        for process in processes:
            process.join(5 if len(results) == size else 0)
            process.kill()
            process.join()
        for end in ends:
            end.close()
    return [results[rank] for rank in range(size)]


def _result(end: Connection, rank: int, may_die: int | None) -> Any:
    try:
        succeeded, value = pickle.loads(end.recv_bytes())
    except EOFError:
        if rank == may_die:
            return None
        raise AssertionError(f"rank {rank} ended without a result") from None
    assert succeeded, f"rank {rank}: {value}"
    return value


def _run(
    end: Connection,
    rank: int,
    size: int,
    place: tuple[str, socket.socket | None],
    device: str,
    work: Work,
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    try:
        address, held = place
        group = join_group(rank, size, address, f"cuda:{rank}" if device == "cuda" else device, held=held)
        answer = (True, work(group, *args))
        group.close()
    except BaseException:
        answer = (False, traceback.format_exc())
    end.send_bytes(pickle.dumps(answer))


def lone_rank(rank: int, size: int, device: str = "cpu") -> TensorParallelGroup:
    """A rank that has met nobody: enough to load its shard, which takes no communication."""
    return TensorParallelGroup(rank, size, torch.device(device))
