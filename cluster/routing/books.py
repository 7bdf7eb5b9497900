"""The gateway's own books: what every worker has to do, from the requests that were placed on it.

A worker's report is a step old and knows nothing of requests on their way to it. So what is free is reckoned here;
only blocks that are lost to quarantine come from the reports. Every entry costs the same however many workers and
requests there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.routing.router import Bar, Choose, Demand, NoPlacement, PairReport, Placement, explain, place, refusals
from cluster.routing.worker_table import WorkerTable, WorkerTraits


@dataclass
class _Booking:
    """What one request takes of its pair; prefill's share ends with the first token. `decode` may be nobody, ""."""

    prefill: str
    decode: str
    prefill_blocks: int
    decode_blocks: int
    prefill_s: float
    prefilling: bool = True


class Books:
    """Workers, and the requests placed on them.

    Args:
        choose: how a pair is chosen for a request.
    """

    def __init__(self, choose: Choose = place) -> None:
        self._choose = choose
        self._prefill, self._decode = WorkerTable(), WorkerTable()
        self._bars: dict[tuple[str, str], Bar] = {}
        self._bookings: dict[str, _Booking] = {}
        self._quarantined: dict[str, int] = {}

    def update_pools(
        self,
        prefill: Mapping[WorkerTraits, bool],
        decode: Mapping[WorkerTraits, bool],
        bars: Mapping[tuple[str, str], Bar],
    ) -> None:
        """Who is there now, and whether it is ready; and who cannot work with whom.

        A worker that is gone takes its bookings' share with it; a new one has nothing to do.
        """
        for table, workers in ((self._prefill, prefill), (self._decode, decode)):
            here = {traits.engine_id for traits in workers}
            for engine_id in table.engine_ids:
                if engine_id not in here:
                    table.remove(engine_id)
                    self._quarantined.pop(engine_id, None)
            for traits, ready in workers.items():
                if traits.engine_id in table:
                    table.set_ready(traits.engine_id, ready)
                else:
                    table.add(traits, ready=ready)
        self._bars = dict(bars)

    def place(self, demand: Demand) -> Placement | NoPlacement:
        """See `router.place`."""
        return self._choose(demand, self._prefill, self._decode, self._bars)

    def explain(self, demand: Demand) -> list[PairReport]:
        """See `router.explain`."""
        return explain(demand, self._prefill, self._decode, self._bars)

    def refusals(self, demand: Demand) -> tuple[str, ...]:
        """See `router.refusals`."""
        return refusals(demand, self._prefill, self._decode, self._bars)

    def book(self, request: str, prefill: str, decode: str, num_tokens: int) -> None:
        """A request of so many tokens is on its way to two workers, or to a prefill worker alone (`decode` is "")."""
        prefill_s = self._prefill.prefill_seconds_of(prefill, num_tokens)
        booking = _Booking(prefill, decode, self._prefill.blocks(prefill, num_tokens), 0, prefill_s)
        self._prefill.take(prefill, blocks=booking.prefill_blocks, requests=1, queued_s=prefill_s)
        if decode:
            booking.decode_blocks = self._decode.blocks(decode, num_tokens)
            self._decode.take(decode, blocks=booking.decode_blocks, requests=1)
        self._bookings[request] = booking

    def first_token(self, request: str) -> None:
        """Its prefill is over."""
        booking = self._bookings.get(request)
        if booking is None or not booking.prefilling:
            return
        booking.prefilling = False
        if booking.prefill in self._prefill:
            self._prefill.take(
                booking.prefill, blocks=-booking.prefill_blocks, requests=-1, queued_s=-booking.prefill_s
            )

    def grown(self, request: str, num_tokens: int) -> None:
        """It has so many tokens now."""
        booking = self._bookings.get(request)
        if booking is None or booking.decode not in self._decode:
            return
        blocks = self._decode.blocks(booking.decode, num_tokens)
        if blocks != booking.decode_blocks:
            self._decode.take(booking.decode, blocks=blocks - booking.decode_blocks)
            booking.decode_blocks = blocks

    def release(self, request: str) -> None:
        """It is over, or nobody cares any more. Nothing happens for one that is not booked."""
        self.first_token(request)
        booking = self._bookings.pop(request, None)
        if booking is not None and booking.decode in self._decode:
            self._decode.take(booking.decode, blocks=-booking.decode_blocks, requests=-1)

    def quarantine(self, engine_id: str, blocks: int) -> None:
        """A worker says that so many of its blocks cannot be used until a peer that was lost is surely gone."""
        table = self._prefill if engine_id in self._prefill else self._decode
        before = self._quarantined.get(engine_id, 0)
        if blocks != before and engine_id in table:
            table.take(engine_id, blocks=blocks - before)
            self._quarantined[engine_id] = blocks
