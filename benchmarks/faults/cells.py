"""The cells of the kill matrix: who is hurt, how, when, and where what comes after it is reached."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

TARGETS = ("prefill", "decode", "both", "gateway", "follower", "node")
HARMS = ("killed", "frozen", "reset")
PHASES = ("before", "while", "after")
ADDRESSES = ("same", "new")
FREEZE_S = 40.0


@dataclass(frozen=True)
class Cell:
    """One of them.

    Attributes:
        target: a prefill worker, a decode worker, one of both (the pair of a handoff), the gateway, the second rank
            of a decode worker, or a node with a worker of each pool.
        harm: killed (SIGKILL), frozen for 40 s (SIGSTOP) or until it is ended before, or cut off: the TCP connections
            are reset that a worker has to other workers (a follower to its lead, too), and all that a gateway or the
            processes of a node have.
        phase: before the first block of a handoff is written, while some are written and others are not, or after it is
            complete.
        address: where its successor is reached, or itself after the connections: same or new.
    """

    target: str
    harm: str
    phase: str
    address: str

    @property
    def name(self) -> str:
        """As the command line has it."""
        return f"{self.target}/{self.harm}/{self.phase}/{self.address}"

    @property
    def not_run(self) -> str:
        """Why there is no such cell; empty: there is."""
        if self.target == "gateway" and self.harm != "killed" and self.address == "new":
            return (
                "the gateway itself goes on, at its address, and a service has no second one"
                if self.harm == "frozen"
                else "the gateway lives, and its address does not change"
            )
        if self.harm == "reset" and self.address == "same":
            if self.target == "gateway":
                return ""
            return "workers that both live meet at endpoints made anew, while the old ones still have their ports"
        return ""


def all_cells() -> Iterator[Cell]:
    """Every combination."""
    for words in itertools.product(TARGETS, HARMS, PHASES, ADDRESSES):
        yield Cell(*words)
