"""A server whose streams are open all the time, and have tokens only in the slices in which it is measured."""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks.line_process import LineProcess

_SERVER, _CLIENT, _BARE = (
    Path(__file__).with_name(f"{name}.py") for name in ("front_door_process", "front_door_client", "bare_door_process")
)
_PATIENCE_S = 120.0


class StreamSide:
    """A tree's server and its clients, each a process of its own.

    Args:
        pythonpath: of the tree.
        streams: that are open.
        step_s: seconds of a step of the decode worker, in which every stream has a token.
        longest: tokens of an answer.
        merging: whether tokens may go together when the event loop is late.
        bare: no Baton, but a bare gRPC server.

    Attributes:
        grpcio: the version of the server's.
        messages: that were received, of each slice.
        tokens: that were said, of each slice.
    """

    def __init__(
        self, pythonpath: str, streams: int, step_s: float, longest: int, *, merging: bool, bare: bool = False
    ) -> None:
        self._streams = streams
        how = "merging" if merging else "each"
        self._server = LineProcess(_BARE if bare else _SERVER, pythonpath, str(streams), str(step_s), "100000", how)
        hello = self._server.answer()
        self.grpcio: str = hello["grpcio"]
        self._client = LineProcess(_CLIENT, pythonpath, "streams", hello["address"], str(streams), str(longest))
        self.messages: list[int] = []
        self.tokens: list[int] = []

    def begin(self) -> None:
        """Wait until all streams have begun.

        Raises:
            RuntimeError: they do not, or a process has ended.
        """
        patience_ends = time.monotonic() + _PATIENCE_S
        while self._client.ask()["begun"] < self._streams:
            if time.monotonic() > patience_ends:
                raise RuntimeError(f"not all of {self._streams} streams have begun after {_PATIENCE_S:g} s")
            time.sleep(0.1)

    def cpu_us_per_token(self, steps: int) -> float:
        """Make so many steps: microseconds of the server's processor time for each token of them."""
        before = self._client.ask()["messages"]
        got = self._server.ask(str(steps))
        self.messages.append(self._client.ask()["messages"] - before)
        self.tokens.append(got["tokens"])
        return float(got["cpu_s"] / got["tokens"] * 1e6)

    @property
    def failures(self) -> int:
        """Requests that have failed so far."""
        return int(self._client.ask()["failures"])

    def end(self) -> None:
        """Kill both."""
        self._client.end()
        self._server.end()


def ends_of_a_burst(pythonpath: str, calls: int, places: int) -> dict[str, int]:
    """How many of so many simultaneous calls end in which status, where so many may wait in the service's own queue."""
    server = LineProcess(_SERVER, pythonpath, "256", "0.01", str(places), "each")
    processes = [server]
    try:
        client = LineProcess(_CLIENT, pythonpath, "burst", server.answer()["address"], str(calls))
        processes.append(client)
        ends: dict[str, int] = client.ask()
        return ends
    finally:
        for process in processes:
            process.end()
