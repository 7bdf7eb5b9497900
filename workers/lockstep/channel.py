"""What the ranks of one worker tell each other at every step: private, ordered, and without a busy loop.

Two connections a follower, over a Unix socket in a folder that only this user can enter, each opened with a secret key
that came with the follower's seat. One carries the steps' inputs from the lead. The other carries what a follower has
to report; the lead never writes to it but at the end, so that a follower waiting on it learns of the lead's death even
while its steps wait in a collective. Only ranks of the same worker write to them, so messages are pickled.
"""

from __future__ import annotations

import contextlib
import pickle
import secrets
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any

from workers.parallel.errors import TensorParallelError
from workers.parallel.rendezvous import hold_address

_INPUTS, _REPORTS = "inputs", "reports"
_END = pickle.dumps(None)


@dataclass(frozen=True)
class Seat:
    """A rank's place in its worker, and how it finds the others.

    Attributes:
        rank: 0 leads.
        size: ranks of the worker.
        address: where they meet for collectives, see `join_group`.
        socket: path of the lead's socket.
        key: opens it.
    """

    rank: int
    size: int
    address: str
    socket: str
    key: bytes


class LeadChannel:
    """The lead's end. It listens from the beginning, so that followers may come before it looks.

    Args:
        size: ranks, the lead included.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._folder = Path(tempfile.mkdtemp(prefix="baton-"))  # mode 0700
        path = str(self._folder / "ranks")
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(path)
        self._server.listen(2 * size)
        key = secrets.token_bytes(32)
        address, self.held_address = hold_address()
        """The socket that keeps the seats' address for the lead's `join_group`, however long that takes to come."""
        self.seats = tuple(Seat(rank, size, address, path, key) for rank in range(size))
        """One for every rank."""
        self._inputs: dict[int, Connection] = {}
        self._reports: dict[int, Connection] = {}
        self._closing = False

    @property
    def connections(self) -> tuple[Connection, ...]:
        """Both of every follower that has come."""
        return (*self._inputs.values(), *self._reports.values())

    def accept(self, timeout_s: float) -> dict[int, Any]:
        """Wait for all followers; what each said first, by rank.

        Raises:
            TensorParallelError: one did not come in time.
        """
        deadline = time.monotonic() + timeout_s
        while len(self._inputs) + len(self._reports) < 2 * (self._size - 1):
            self._server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                accepted, _ = self._server.accept()
            except TimeoutError:
                missing = ", ".join(str(r) for r in range(1, self._size) if r not in self._reports)
                raise TensorParallelError(f"rank {missing} did not come within {timeout_s:g} s") from None
            connection = Connection(accepted.detach())
            try:
                deliver_challenge(connection, self.seats[0].key)
                answer_challenge(connection, self.seats[0].key)
                kind, rank = pickle.loads(connection.recv_bytes())
            except (AuthenticationError, EOFError, OSError):
                connection.close()
                continue
            (self._inputs if kind == _INPUTS else self._reports)[rank] = connection
        self._server.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        return {rank: pickle.loads(self._reports[rank].recv_bytes()) for rank in range(1, self._size)}

    def listen(self, on_report: Callable[[int, Any], None], on_lost: Callable[[int], None]) -> None:
        """Have every report taken, and be told of a follower that is gone, each on a thread of the follower's."""
        for rank, connection in self._reports.items():
            arguments = (rank, connection, on_report, on_lost)
            threading.Thread(target=self._read, args=arguments, name=f"rank-{rank}-reports", daemon=True).start()

    def send(self, step_input: object) -> None:
        """Send a step's input to every follower.

        Raises:
            TensorParallelError: one is gone.
        """
        data = pickle.dumps(step_input, pickle.HIGHEST_PROTOCOL)
        for rank, connection in self._inputs.items():
            try:
                connection.send_bytes(data)
            except OSError as error:
                raise TensorParallelError(f"rank {rank} is gone") from error

    def close(self) -> None:
        """Tell the followers to end."""
        self._closing = True
        self._server.close()
        self.held_address.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.send_bytes(_END)
        for connection in self._inputs.values():
            connection.close()

    def _read(
        self,
        rank: int,
        connection: Connection,
        on_report: Callable[[int, Any], None],
        on_lost: Callable[[int], None],
    ) -> None:
        with connection, contextlib.suppress(EOFError, OSError):
            while True:
                on_report(rank, pickle.loads(connection.recv_bytes()))
        if not self._closing:
            on_lost(rank)


class FollowerChannel:
    """A follower's end.

    Args:
        seat: the follower's.
        first_report: what the lead's `accept` returns for this rank.
        on_lost: called, on a thread of its own, when the lead is gone without having said so.
    """

    def __init__(self, seat: Seat, first_report: object, on_lost: Callable[[], None]) -> None:
        self._inputs = _connect(seat, _INPUTS)
        self._reports = _connect(seat, _REPORTS)
        self._on_lost = on_lost
        self._closing = False
        self.report(first_report)
        self._watcher = threading.Thread(target=self._watch, name="lead-watcher", daemon=True)
        self._watcher.start()

    def receive(self) -> Any:
        """The next step's input; None when the lead has ended in good order.

        Raises:
            EOFError: the lead is gone.
        """
        try:
            return pickle.loads(self._inputs.recv_bytes())
        except OSError as error:
            raise EOFError("the lead is gone") from error

    def report(self, report: object) -> None:
        """Tell the lead something; one thread at a time. Nobody is told when the lead is gone."""
        with contextlib.suppress(OSError):
            self._reports.send_bytes(pickle.dumps(report, pickle.HIGHEST_PROTOCOL))

    def close(self) -> None:
        """Leave: the lead is told by the end of the connections."""
        self._closing = True
        self._inputs.close()
        _shut_down(self._reports)

    def _watch(self) -> None:
        with self._reports:
            try:
                self._reports.recv_bytes()
            except (EOFError, OSError):
                if not self._closing:
                    self._on_lost()


def _connect(seat: Seat, kind: str) -> Connection:
    connection = Client(seat.socket, family="AF_UNIX", authkey=seat.key)
    connection.send_bytes(pickle.dumps((kind, seat.rank)))
    return connection


def _shut_down(connection: Connection) -> None:
    """End a connection under whoever reads from it: to close it alone would not wake them."""
    with contextlib.suppress(OSError), socket.socket(fileno=connection.fileno()) as ending:
        try:
            ending.shutdown(socket.SHUT_RDWR)
        finally:
            ending.detach()
