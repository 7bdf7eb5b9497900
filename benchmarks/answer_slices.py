"""A moment of work for a server: a batch of requests from first to last token, and the processor time that it cost."""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks.line_process import LineProcess


@dataclass
class Side:
    """A server and its clients, each a process of its own that does nothing until it is asked.

    Attributes:
        server: answers with `cpu_s`, its processor seconds so far.
        client: sends its batch, and answers with the `tokens`, `messages` and `failures` of it.
        messages: that were received, of each slice.
        failures: requests that failed, of all slices.
    """

    server: LineProcess
    client: LineProcess
    messages: list[int] = field(default_factory=list)
    failures: int = 0

    def cpu_us_per_token(self) -> float:
        """Send a batch: microseconds of the server's processor time for each token of it.

        Raises:
            RuntimeError: a process has ended, or no token came.
        """
        before = self.server.ask()["cpu_s"]
        got = self.client.ask()
        spent = self.server.ask()["cpu_s"] - before
        if not got["tokens"]:
            raise RuntimeError(f"no token of the batch came: {got}")
        self.messages.append(got["messages"])
        self.failures += got["failures"]
        return float(spent / got["tokens"] * 1e6)

    def end(self) -> None:
        """Kill both."""
        self.client.end()
        self.server.end()
