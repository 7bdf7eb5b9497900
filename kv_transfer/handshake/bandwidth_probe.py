"""Moving real data to a peer before the first request does: pays for the first contact, and measures the path.

What is first costs most: connections are made, and a GPU gets access to another's memory. Only memory that nobody uses
is written to, because the peer's cache may be in use; and nothing is read, because UCX reads GPU memory over TCP.
"""

from __future__ import annotations

import time
from collections.abc import Generator

from kv_transfer.errors import PeerError
from kv_transfer.link_cost import LinkCost
from kv_transfer.transports.base import PROBE_PIECE_BYTES, PROBE_PIECES, Transfer, TransferState, Transport

_REPEATS = 5
_SPIN_S = 0.002
_SMALLEST_S = 1e-9
_TIMES_ONE, _MOST_TOGETHER = 4.0, 64


def probe_bandwidth(transport: Transport, peer: str, message: bytes) -> Generator[None, None, LinkCost]:
    """Measure the way to a peer, on the thread that owns the transport; yields whenever others should have their turn.

    Posting n descriptors takes write_s + n · descriptor_s, and b bytes land after a while + b / bytes_per_s. Both come
    from differences between transfers, and each time is the shortest of some repeats. The while is as long as the
    peer's thread takes to look, some hundred microseconds, in which NVLink moves more than all pieces: so WRITEs of all
    pieces are posted together, more and more of them, until moving them takes several times the while.

    Args:
        transport: which knows the peer.
        peer: its engine id.
        message: goes with every WRITE, as with a handoff; the peer must be able to ignore it.

    Raises:
        PeerError: the peer is unknown or gone, or a transfer failed.
    """
    one_s, one_landed_s = yield from _shortest(transport, peer, range(1), message)
    scattered = range(0, PROBE_PIECES, 2)
    scattered_s, _ = yield from _shortest(transport, peer, scattered, message)
    writes = 1
    _, landed_s = yield from _shortest(transport, peer, range(PROBE_PIECES), message)
    while landed_s < _TIMES_ONE * one_landed_s and writes < _MOST_TOGETHER:
        writes *= 4
        _, landed_s = yield from _shortest(transport, peer, range(PROBE_PIECES), message, writes)
    descriptor_s = max(0.0, scattered_s - one_s) / (len(scattered) - 1)
    moving_s = landed_s - min(one_landed_s, landed_s / 2)  # noise must not make the way look endlessly fast
    return LinkCost(
        write_s=max(one_s - descriptor_s, _SMALLEST_S),
        descriptor_s=descriptor_s,
        bytes_per_s=writes * PROBE_PIECES * PROBE_PIECE_BYTES / max(moving_s, _SMALLEST_S),
    )


def _shortest(
    transport: Transport, peer: str, pieces: range, message: bytes, writes: int = 1
) -> Generator[None, None, tuple[float, float]]:
    """Seconds to post so many WRITEs of these pieces, and until all have landed: the shortest of each."""
    posts, landings = [], []
    for _ in range(_REPEATS):
        started = time.monotonic()
        transfers = [transport.probe_bandwidth(peer, pieces, message) for _ in range(writes)]
        posts.append(time.monotonic() - started)
        for transfer in transfers:
            yield from _landing(peer, transfer)
        landings.append(time.monotonic() - started)
        yield
    return min(posts), min(landings)


def _landing(peer: str, transfer: Transfer) -> Generator[None, None, None]:
    """Wait for a transfer: for a moment without a pause, so that short ones are measured well."""
    spin_until = time.monotonic() + _SPIN_S
    while (state := transfer.state()) is TransferState.IN_FLIGHT:
        if time.monotonic() >= spin_until:
            yield
    if state is TransferState.FAILED:
        raise PeerError(f"a transfer to {peer} failed")
