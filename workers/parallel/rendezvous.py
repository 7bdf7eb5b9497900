"""How the ranks of a worker find each other: a store on loopback, where each says that it is here."""

from __future__ import annotations

import socket
import time
from datetime import timedelta
from urllib.parse import urlsplit

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from workers.parallel.errors import TensorParallelError

_POLL_S = 0.01
_LINGER_S = 1.0
_GAVE_UP = "gave-up"
_HEARD = "heard"


def hold_address() -> tuple[str, socket.socket]:
    """An address on loopback for `join_group`, and the socket that holds it for rank 0.

    The socket is bound and does not listen: nobody else is given its port, neither to listen at nor for a connection of
    their own, and a rank that comes before rank 0 is turned away and comes again.
    """
    held = socket.socket()
    held.bind(("127.0.0.1", 0))
    return f"tcp://127.0.0.1:{held.getsockname()[1]}", held


def meet(rank: int, size: int, address: str, timeout_s: float, held: socket.socket | None = None) -> Store:
    """The store of a group, once all of its ranks have come. Rank 0 keeps it, and everybody else's ends with it.

    Args:
        rank: this one.
        size: of the group.
        address: where it meets.
        timeout_s: seconds until all must be here.
        held: rank 0's, see `hold_address`; it is the store's from now on.

    Raises:
        ValueError: an address that makes no sense, or rank 0 without the socket that holds it.
        TensorParallelError: a rank did not come in time, or came twice.
    """
    host, port = _loopback(address)
    if (rank == 0) != (held is not None):
        raise ValueError(f"rank {rank} of {size}: rank 0, and nobody else, brings the socket that holds {address}")
    deadline = time.monotonic() + timeout_s
    if held is not None:
        store = _listen(held, port, size, deadline)
    else:
        store = _connect(host, port, rank, size, deadline, timeout_s)
    try:
        if store.add(_key(rank), 1) > 1:
            raise TensorParallelError(f"rank {rank} of {size} came to {address} twice")
        _wait_for_all(store, rank, size, deadline, f"did not come to {address} within {timeout_s:g} s")
    except RuntimeError as error:
        raise TensorParallelError(f"rank {rank} of {size}: rank 0 was lost while the ranks met at {address}") from error
    return PrefixStore("group", store)


def _loopback(address: str) -> tuple[str, int]:
    parts = urlsplit(address)
    if parts.scheme != "tcp" or parts.hostname not in ("127.0.0.1", "localhost") or not parts.port:
        raise ValueError(f"address {address!r}: must be tcp://127.0.0.1:port")
    return "127.0.0.1", parts.port


def _listen(held: socket.socket, port: int, size: int, deadline: float) -> Store:
    """Rank 0's: on a socket that was made here, because a store that makes its own listens on every interface."""
    held.listen(2 * size)
    return _store("127.0.0.1", port, size, deadline, held.detach())


def _connect(host: str, port: int, rank: int, size: int, deadline: float, timeout_s: float) -> Store:
    """Any other rank's, as soon as rank 0 listens."""
    while True:
        try:
            socket.create_connection((host, port), timeout=max(_POLL_S, deadline - time.monotonic())).close()
            return _store(host, port, size, deadline)
        except (OSError, RuntimeError) as error:
            if time.monotonic() >= deadline:
                raise TensorParallelError(
                    f"rank {rank} of {size}: rank 0 did not come to tcp://{host}:{port} within {timeout_s:g} s"
                ) from error
        time.sleep(_POLL_S)


def _store(host: str, port: int, size: int, deadline: float, listener: int | None = None) -> Store:
    patience = timedelta(seconds=max(1.0, deadline - time.monotonic()))
    return TCPStore(host, port, size, listener is not None, patience, wait_for_workers=False, master_listen_fd=listener)


def _wait_for_all(store: Store, rank: int, size: int, deadline: float, problem: str) -> None:
    """Rank 0 decides that somebody is missing, and says so to those who came before its store ends."""
    while not store.check([_key(other) for other in range(size)]):
        if rank != 0 and store.check([_GAVE_UP]):
            missing = store.get(_GAVE_UP).decode()
            store.add(_HEARD, 1)
            raise TensorParallelError(f"rank {rank} of {size}: rank {missing} {problem}")
        if rank == 0 and time.monotonic() >= deadline:
            absent = [other for other in range(size) if not store.check([_key(other)])]
            missing = ", ".join(map(str, absent))
            store.set(_GAVE_UP, missing)
            _linger(store, size - 1 - len(absent))
            raise TensorParallelError(f"rank 0 of {size}: rank {missing} {problem}")
        time.sleep(_POLL_S)


def _linger(store: Store, others: int) -> None:
    """Until so many have heard, at most `_LINGER_S`."""
    until = time.monotonic() + _LINGER_S
    while store.add(_HEARD, 0) < others and time.monotonic() < until:
        time.sleep(_POLL_S)


def _key(rank: int) -> str:
    return f"rank-{rank}"
