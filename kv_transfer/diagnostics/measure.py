"""Measuring the path to a peer with the transport that handoffs use."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from kv_transfer.diagnostics.report import Measured, Posting, Rate
from kv_transfer.errors import PeerError
from kv_transfer.handshake.bandwidth_probe import probe_bandwidth
from kv_transfer.link_cost import LinkCost
from kv_transfer.transports.base import Transfer, TransferState
from kv_transfer.transports.nixl import NixlTransport
from kv_transfer.transports.nixl_endpoint import NixlTransfer

S = TypeVar("S")

PING = b"ping"
NOTE = b"note"
"""Messages of this check: the peer sends the first one back, and ignores the other."""

_GROUP, _LAYER = 0, range(1)
_POSTED_BLOCKS = (1, 32, 1024)
_RATE_BYTES = (1 << 16, 1 << 20, 1 << 24)
_REPEATS, _ROUND_TRIPS = 9, 200
_ENOUGH_S = 1.0
_PATIENCE_S = 20.0


def measure_path(transport: NixlTransport, peer: str, num_blocks: int, block_bytes: int) -> Measured:
    """Measure everything; the peer must answer pings meanwhile.

    Args:
        transport: with this side's memory registered, and the peer added.
        peer: its engine id.
        num_blocks: that both sides have, in one layer.
        block_bytes: bytes of each.

    Raises:
        PeerError: a transfer failed, or took longer than the patience for one.
    """
    first_contact_s, _ = _meet(transport, peer)
    started = time.monotonic()
    _wait(peer, transport.write(peer, _GROUP, _LAYER, range(1), range(1), NOTE))
    first_write_s = time.monotonic() - started
    _, cost = _meet(transport, peer)
    sizes = [size for size in _RATE_BYTES if size < num_blocks * block_bytes] + [num_blocks * block_bytes]
    rates = [rate for operation in ("WRITE", "READ") for rate in _rates(transport, peer, operation, sizes, block_bytes)]
    counts = [count for count in _POSTED_BLOCKS if 2 * count <= num_blocks]
    postings = tuple(_posting(transport, peer, count, contiguous=False) for count in counts)
    together = _posting(transport, peer, counts[-1], contiguous=True)
    return Measured(
        first_contact_s, first_write_s, cost, tuple(rates), (*postings, together), _round_trip_s(transport, peer)
    )


def _meet(transport: NixlTransport, peer: str) -> tuple[float, LinkCost]:
    started = time.monotonic()
    steps = probe_bandwidth(transport, peer, NOTE)
    while True:
        try:
            next(steps)
        except StopIteration as ended:
            cost: LinkCost = ended.value
            return time.monotonic() - started, cost
        _check_patience(peer, started)


def _rates(
    transport: NixlTransport, peer: str, operation: str, sizes: Sequence[int], block_bytes: int
) -> Iterator[Rate]:
    """One size after the other, until one would take too long."""
    bytes_per_s = float("inf")
    for size in sizes:
        if size / bytes_per_s > _ENOUGH_S:
            return
        bytes_per_s = size / _contiguous_s(transport, peer, operation, max(1, size // block_bytes))
        yield Rate(operation, size, bytes_per_s)


def _contiguous_s(transport: NixlTransport, peer: str, operation: str, count: int) -> float:
    """Median seconds that the first `count` blocks take."""
    blocks = range(count)

    def once() -> float:
        started = time.monotonic()
        if operation == "WRITE":
            _wait(peer, transport.write(peer, _GROUP, _LAYER, blocks, blocks, NOTE))
        else:
            _wait(peer, transport.read(peer, _GROUP, _LAYER, blocks, blocks))
        return time.monotonic() - started

    return statistics.median(_repeat(once))


def _posting(transport: NixlTransport, peer: str, count: int, *, contiguous: bool) -> Posting:
    blocks: Sequence[int] = range(count) if contiguous else range(0, 2 * count, 2)
    num_descriptors = 0

    def once() -> tuple[float, float]:
        nonlocal num_descriptors
        started = time.monotonic()
        transfer = transport.write(peer, _GROUP, _LAYER, blocks, blocks, NOTE)
        posted = time.monotonic()
        _wait(peer, transfer)
        if isinstance(transfer, NixlTransfer):
            num_descriptors = transfer.num_descriptors
        return posted - started, time.monotonic() - started

    samples = _repeat(once)
    post_s, landed_s = (statistics.median(sample[i] for sample in samples) for i in range(2))
    return Posting(count, contiguous, num_descriptors, post_s, landed_s)


def _round_trip_s(transport: NixlTransport, peer: str) -> float:
    def once() -> float:
        started = time.monotonic()
        transport.send(peer, PING)
        while not any(sender == peer and message == PING for sender, message in transport.receive()):
            _check_patience(peer, started)
        return time.monotonic() - started

    return statistics.median(_repeat(once, _ROUND_TRIPS))


def _repeat(once: Callable[[], S], repeats: int = _REPEATS) -> list[S]:
    """Results of a few runs after one that does not count; fewer when they take long."""
    once()
    results: list[S] = []
    give_up_at = time.monotonic() + _ENOUGH_S
    while len(results) < repeats and (not results or time.monotonic() < give_up_at):
        results.append(once())
    return results


def _wait(peer: str, transfer: Transfer) -> None:
    started = time.monotonic()
    while (state := transfer.state()) is TransferState.IN_FLIGHT:
        _check_patience(peer, started)
    if state is TransferState.FAILED:
        raise PeerError(f"a transfer with {peer} failed")


def _check_patience(peer: str, started: float) -> None:
    if time.monotonic() - started > _PATIENCE_S:
        raise PeerError(f"{peer} did not answer within {_PATIENCE_S:g} s")
