"""One request as those who look see it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cluster.api import EngineRequest
from cluster.gateway.attempt import Attempt
from cluster.routing.types import Placement


@dataclass(eq=False)
class LiveRequest:
    """A request, from its arrival on.

    Attributes:
        number: counts requests.
        request: as it came; None once it is over, so that its prompt is not kept.
        arrived: Unix time, seconds.
        state: queued, prefill, handoff, decode, and then how it ended: stop, length, abort, error.
        placement: why it is where it is: what the router expected of the workers that it chose.
        attempt: the last one.
        error: why it failed.
    """

    number: int
    request: EngineRequest | None
    request_id: str
    user: str
    prompt_tokens: int
    max_tokens: int
    arrived: float
    state: str = "queued"
    placement: Placement | None = None
    attempt: Attempt | None = None
    error: str = ""
    migrations: int = 0
    ended: float = 0.0

    @classmethod
    def of(cls, number: int, request: EngineRequest, arrived: float) -> LiveRequest:
        """One that has just come."""
        size, most = len(request.prompt_token_ids), request.sampling.max_tokens or 1
        return cls(number, request, request.request_id, request.user, size, most, arrived)

    def as_json(self) -> dict[str, Any]:
        """All of it in plain values; times in seconds."""
        attempt, placement = self.attempt, self.placement
        shown: dict[str, Any] = {
            "number": self.number,
            "id": self.request_id,
            "user": self.user,
            "arrived": self.arrived,
            "state": self.state,
            "prompt_tokens": self.prompt_tokens,
            "max_tokens": self.max_tokens,
            "output_tokens": max(0, attempt.num_tokens - self.prompt_tokens) if attempt else 0,
            "error": self.error,
            "migrations": self.migrations,
            "ended": self.ended,
        }
        if attempt is not None:
            report = attempt.report()
            shown |= {
                "prefill": attempt.prefill,
                "decode": attempt.decode,
                "queue_s": report.queue_s,
                "prefill_s": report.prefill_s,
                "transfer_s": report.transfer_s,
                "exposed_s": report.exposed_transfer_s,
                "ttft_s": report.ttft_s if attempt.first_token_at else None,
                "kv_bytes": report.kv_bytes,
                "attempts": report.attempts,
                "cached_tokens": report.cached_tokens,
            }
        if placement is not None:
            shown["expected"] = {
                "ttft_s": placement.ttft_s,
                "itl_s": placement.itl_s,
                "cached_tokens": placement.cached_tokens,
            }
        return shown
