"""What names one reservation of one handoff."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HandoffKey:
    """Names one reservation of one handoff.

    Attributes:
        handoff_id: 16 random bytes, given by the gateway to both sides.
        incarnation: of the decode engine that made the reservation.
        generation: counts that engine's reservations, so that no two are ever taken for each other.
    """

    handoff_id: bytes
    incarnation: int
    generation: int

    def __str__(self) -> str:
        return f"{self.handoff_id.hex()[:8]}/{self.generation}"
