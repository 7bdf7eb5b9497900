"""How ranks meet, and what they do together."""

from __future__ import annotations

import socket
import sys
import threading
import time
from urllib.parse import urlsplit

import pytest
import torch
import torch.distributed as dist

from rank_work import call_collectives, lose_a_rank
from ranks import run_ranks
from workers.errors import BatonError
from workers.parallel.errors import TensorParallelError
from workers.parallel.group import SINGLE, TensorParallelGroup, hold_address, join_group


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_collectives(device: str) -> None:
    size = 3 if device == "cpu" else 2
    if device == "cuda" and torch.cuda.device_count() < size:
        pytest.skip("needs two CUDA devices")
    results = run_ranks(size, call_collectives, device=device)
    gathered = torch.cat([torch.arange(4).view(2, 2) + 10 * rank for rank in range(size)], dim=1).bfloat16()
    for result in results:
        assert result["in place"]
        assert torch.equal(result["sum"], torch.full((3, 2), float(sum(10**rank for rank in range(size)))))
        assert torch.equal(result["gathered"], gathered)
        assert result["out"]
        assert torch.equal(result["gathered there"], gathered)
        assert result["least"] == [2**40, 1 - size]
        assert result["closed"]
        for dtype, noise in result["noise"].items():
            assert torch.equal(noise, results[0]["noise"][dtype])
        if sys.platform == "linux":
            assert result["sockets"] <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    if sys.platform == "linux":
        assert results[0]["sockets"]


def test_one_rank_needs_nobody() -> None:
    group = join_group(0, 1, "nowhere", "cpu")
    for alone in (group, SINGLE, TensorParallelGroup.single("cpu")):
        x = torch.tensor([[1.0, 2.0]])
        assert (alone.rank, alone.size) == (0, 1)
        assert alone.all_reduce(x) is x
        assert alone.all_gather(x) is x
        out = torch.zeros(1, 2)
        assert alone.all_gather(x, out) is out
        assert torch.equal(out, x)
        assert alone.agree_min(7) == 7
        alone.barrier()
        alone.close()
    assert not dist.is_initialized()


def test_a_rank_that_dies_is_an_error_to_the_others() -> None:
    *survivors, lost = run_ranks(3, lose_a_rank, may_die=2)
    assert lost is None
    for rank, (on_device, on_host) in enumerate(survivors):
        assert on_device.startswith(f"rank {rank} of 3: all_reduce failed: ")
        assert on_host.startswith(f"rank {rank} of 3: agree_min failed: ")


def errors_of(ranks: list[int], size: int, address: str, held: socket.socket, timeout_s: float) -> list[str]:
    """What each of some ranks of a group hears that is never complete, and that they hear it in time."""
    errors: list[str | None] = [None] * len(ranks)

    def join(i: int) -> None:
        try:
            join_group(ranks[i], size, address, "cpu", timeout_s, held if ranks[i] == 0 else None)
        except TensorParallelError as error:
            errors[i] = str(error)

    threads = [threading.Thread(target=join, args=(i,), daemon=True) for i in range(len(ranks))]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert time.monotonic() - started < timeout_s + 10
    assert not dist.is_initialized()
    return [str(error) for error in errors]


def test_a_missing_rank_is_named_to_all_who_came() -> None:
    address, held = hold_address()
    problem = f"rank 1, 4 did not come to {address} within 0.5 s"
    assert errors_of([0, 2, 3], 5, address, held, 0.5) == [f"rank {rank} of 5: {problem}" for rank in (0, 2, 3)]


def test_without_rank_0_nobody_meets() -> None:
    address, held = hold_address()
    assert errors_of([1], 2, address, held, 0.3) == [f"rank 1 of 2: rank 0 did not come to {address} within 0.3 s"]
    assert issubclass(TensorParallelError, BatonError)


def test_a_rank_comes_once() -> None:
    address, held = hold_address()
    errors = errors_of([0, 1, 1], 3, address, held, 0.5)
    assert f"rank 1 of 3 came to {address} twice" in errors[1:]
    assert errors[0] == f"rank 0 of 3: rank 2 did not come to {address} within 0.5 s"


def test_nobody_else_gets_the_address_before_rank_0_listens() -> None:
    address, held = hold_address()
    place = (urlsplit(address).hostname, urlsplit(address).port)
    with held, socket.socket() as other:
        with pytest.raises(ConnectionRefusedError):
            other.connect(place)
        with pytest.raises(OSError, match="in use"):
            socket.create_server(place)
        with pytest.raises(OSError, match="in use"):
            other.bind(("0.0.0.0", place[1]))


def test_only_rank_0_brings_the_socket() -> None:
    address, held = hold_address()
    with held:
        for rank, brought in ((0, None), (1, held)):
            with pytest.raises(ValueError, match=f"rank {rank} of 2: rank 0, and nobody else, brings the socket"):
                join_group(rank, 2, address, "cpu", 5.0, brought)


@pytest.mark.parametrize("address", ["127.0.0.1:80", "tcp://10.0.0.1:80", "tcp://127.0.0.1", "http://127.0.0.1:80", ""])
def test_only_loopback_will_do(address: str) -> None:
    with pytest.raises(ValueError, match=r"must be tcp://127\.0\.0\.1:port"):
        join_group(0, 2, address, "cpu", 5.0)


@pytest.mark.parametrize(("rank", "size"), [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_that_cannot_be(rank: int, size: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank} of {size} ranks"):
        join_group(rank, size, "tcp://127.0.0.1:80", "cpu", 5.0)
