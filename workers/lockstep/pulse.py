"""The ranks that follow let themselves be heard, whatever their steps are at; a frozen one is silent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

PULSE_S = 1.0
"""A rank lets itself be heard this often."""
SILENT_ROUNDS = 5
"""So many rounds without a word are a frozen rank."""


@dataclass(frozen=True)
class Pulse:
    """A follower lives.

    Attributes:
        broken_peers: those to whom its own connection is broken, see `AgreedConnector.broken_peers`.
    """

    broken_peers: Mapping[str, str] = field(default_factory=dict)


class Pulses:
    """What the lead hears of the others. Rounds are counted, no clock is read: a lead that was held up itself finds
    what they said meanwhile before its next round.

    Args:
        size: ranks of the worker, the lead included.
    """

    def __init__(self, size: int) -> None:
        self._silent_for = dict.fromkeys(range(1, size), 0)
        self._broken: dict[int, Mapping[str, str]] = {}

    def hear(self, rank: int, pulse: Pulse | None = None) -> None:
        """A rank has said something."""
        self._silent_for[rank] = 0
        if pulse is not None:
            self._broken[rank] = pulse.broken_peers

    def next_round(self) -> tuple[int, ...]:
        """About `PULSE_S` have passed since the last call. Returns the ranks that are silent."""
        for rank in self._silent_for:
            self._silent_for[rank] += 1
        return tuple(rank for rank, rounds in self._silent_for.items() if rounds > SILENT_ROUNDS)

    @property
    def broken_peers(self) -> dict[str, str]:
        """Of all ranks together."""
        return {peer: endpoint for broken in tuple(self._broken.values()) for peer, endpoint in broken.items()}
