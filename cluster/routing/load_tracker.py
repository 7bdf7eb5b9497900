"""The gateway's own books: what every worker has to do, from the requests that were placed on it.

A worker's report is a step old and knows nothing of requests on their way to it. So what is free is reckoned here;
only blocks that are lost to quarantine come from the reports. Every entry costs the same however many workers and
requests there are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cluster.routing.arrival_rate import ArrivalRate
from cluster.routing.links import Links
from cluster.routing.output_lengths import HORIZONS, OutputLengths
from cluster.routing.pair_failures import PairFailures
from cluster.routing.prefix_index import PrefixIndex
from cluster.routing.router import Choose, explain, place, unsupported_reasons
from cluster.routing.types import CandidateReport, Incompatibility, NoPlacement, Placement, RoutingRequest
from cluster.routing.worker_table import WorkerTable, WorkerTraits
from kv_transfer.link_cost import LinkCost
from workers.kv_cache.block_pool import blocks_for
from workers.messages import CacheUpdate

_NEVER = 2**31
_NOTHING = np.zeros((2, len(HORIZONS)))


@dataclass
class _Booking:
    """What one request takes of its pair; prefill's share ends with the first token.

    `decode` may be nobody, ""; `prefill` may be None: the decode worker computes the prompt, too. Of `decode_places`,
    the blocks of all its tokens, it holds `decode_blocks`; `running` of its samples have not ended.
    """

    prefill: str | None
    decode: str
    prefill_blocks: int
    decode_blocks: int
    prefill_s: float
    prompt_tokens: int
    max_tokens: int
    future: npt.NDArray[np.float64]
    prefilling: bool = True
    decode_places: int = 0
    running: int = 1


class LoadTracker:
    """Workers, and the requests placed on them.

    Args:
        choose: how a pair is chosen for a request.
        max_queued_s: seconds of prompts that a worker may have to compute before it gets more; what waits longer waits
            at the gateway, where its turn and its objective count.
        disaggregation: where prompts may be computed, see `RoutingRequest`.
        clock: seconds, for how often requests come.
    """

    def __init__(
        self,
        choose: Choose = place,
        max_queued_s: float = math.inf,
        disaggregation: str = "always",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._choose = choose
        self._max_queued_s = max_queued_s
        self._disaggregation = disaggregation
        self._arrivals = ArrivalRate(clock)
        self._lengths = OutputLengths()
        self._prefill, self._decode = WorkerTable(), WorkerTable()
        self._links = Links(PairFailures(clock))
        self._prefixes = PrefixIndex()
        self._bookings: dict[str, _Booking] = {}
        self._quarantined: dict[str, int] = {}

    def update_pools(
        self,
        prefill: Mapping[WorkerTraits, bool],
        decode: Mapping[WorkerTraits, bool],
        incompatibilities: Mapping[tuple[str, str], Incompatibility],
        links: Mapping[str, Mapping[str, LinkCost]] | None = None,
    ) -> None:
        """Who is there now, and whether it is ready; who cannot work with whom; what the links between them cost.

        A worker that is gone takes its bookings' share with it; a new one has nothing to do. A link that was known
        before need not be given again; they are by prefill worker, then by decode worker.
        """
        pools = (self._prefill, prefill), (self._decode, decode)
        for table, workers in pools:
            here = {traits.engine_id for traits in workers}
            for engine_id in [engine_id for engine_id in table.engine_ids if engine_id not in here]:
                table.remove(engine_id)
                self._prefixes.remove(engine_id)
                self._quarantined.pop(engine_id, None)
        for table, workers in pools:
            for traits, ready in workers.items():
                if traits.engine_id in table:
                    table.set_ready(traits.engine_id, ready)
                else:
                    table.add(traits, ready=ready, cache=self._prefixes.add(traits.engine_id, traits.block_size))
        self._links.update(self._prefill, self._decode, incompatibilities, links)

    @property
    def prefill_workers(self) -> WorkerTable:
        """The prefill workers, and what each has to do."""
        return self._prefill

    @property
    def decode_workers(self) -> WorkerTable:
        """The decode workers, and what each has to do."""
        return self._decode

    @property
    def block_sizes(self) -> frozenset[int]:
        """For which a prompt's hashes may be asked for."""
        return frozenset(self._prefixes.block_sizes)

    @property
    def needed_roles(self) -> tuple[str, ...]:
        """The pools without whose workers no request can be served."""
        return ("prefill", "decode") if self._disaggregation == "always" else ("decode",)

    def place(self, request: RoutingRequest) -> Placement | NoPlacement:
        """See `router.place`."""
        return self._choose(self._as_known(request), self._prefill, self._decode, self._links)

    def explain(self, request: RoutingRequest) -> list[CandidateReport]:
        """See `router.explain`."""
        return explain(self._as_known(request), self._prefill, self._decode, self._links)

    def unsupported_reasons(self, request: RoutingRequest) -> tuple[str, ...]:
        """See `router.unsupported_reasons`."""
        return unsupported_reasons(self._as_known(request), self._prefill, self._decode, self._links)

    def cache_update(self, engine_id: str, update: CacheUpdate) -> None:
        """A worker's prefix cache has changed."""
        self._prefixes.update(engine_id, update.stored, update.removed)

    def reserve(
        self,
        request: str,
        prefill: str | None,
        decode: str,
        num_tokens: int,
        max_tokens: int = 1,
        cached_tokens: int = 0,
        num_samples: int = 1,
    ) -> None:
        """A request is on its way to two workers, or to one alone: prefill (`decode` is "") or decode.

        Args:
            request: its name.
            prefill: engine id; None: the decode worker computes the prompt.
            decode: engine id.
            num_tokens: of its prompt.
            max_tokens: the most that it may generate.
            cached_tokens: of its prompt, that the worker that computes it has in its cache.
            num_samples: sequences that go on from it.
        """
        self._arrivals.count()
        booking = _Booking(prefill, decode, 0, 0, 0.0, num_tokens, max_tokens, _NOTHING, running=num_samples)
        local_s = 0.0
        if prefill is None:
            booking.prefill_s = local_s = self._decode.local_seconds_of(decode, num_tokens, cached_tokens)
        else:
            booking.prefill_s = self._prefill.prefill_seconds_of(prefill, num_tokens, cached_tokens)
            booking.prefill_blocks = self._prefill.blocks(prefill, num_tokens)
            self._prefill.take(prefill, blocks=booking.prefill_blocks, requests=1, queued_s=booking.prefill_s)
        if decode:
            booking.decode_places = blocks_for(num_tokens + 1, self._decode.traits(decode).block_size)
            booking.decode_blocks = self._decode.blocks(decode, num_tokens, num_samples, num_tokens)
            booking.future = self._future(booking, num_tokens)
            self._decode.take(
                decode,
                blocks=booking.decode_blocks,
                requests=num_samples,
                queued_s=local_s,
                future=booking.future,
            )
        self._bookings[request] = booking

    def first_token(self, request: str) -> None:
        """Its prefill is over."""
        booking = self._bookings.get(request)
        if booking is None or not booking.prefilling:
            return
        booking.prefilling = False
        if booking.prefill is None:
            if booking.decode in self._decode:
                self._decode.take(booking.decode, queued_s=-booking.prefill_s)
        elif booking.prefill in self._prefill:
            self._prefill.take(
                booking.prefill, blocks=-booking.prefill_blocks, requests=-1, queued_s=-booking.prefill_s
            )

    def grown(self, request: str, num_tokens: int, running: int = 1) -> int:
        """It has so many tokens now, each of its samples that are `running` still.

        Returns:
            By how many more tokens each sample may grow before this needs to be known again.
        """
        booking = self._bookings.get(request)
        if booking is None or booking.decode not in self._decode:
            return _NEVER
        block_size = self._decode.traits(booking.decode).block_size
        places = blocks_for(num_tokens + 1, block_size)
        if places != booking.decode_places or running != booking.running:
            ended, booking.running = booking.running - running, running
            blocks = self._decode.blocks(booking.decode, num_tokens, running, booking.prompt_tokens)
            future = self._future(booking, num_tokens)
            self._decode.take(
                booking.decode,
                blocks=blocks - booking.decode_blocks,
                requests=-ended,
                future=future - booking.future,
            )
            booking.decode_places, booking.decode_blocks, booking.future = places, blocks, future
        return places * block_size - num_tokens - 1

    def sample_finished(self, request: str, num_tokens: int) -> None:
        """One of its samples has ended by itself, with so many tokens in all: learn from it."""
        if (booking := self._bookings.get(request)) is not None:
            self._lengths.observe(booking.max_tokens, num_tokens - booking.prompt_tokens)

    def finished(self, request: str, num_tokens: int) -> None:
        """It has ended by itself, with so many tokens in all: learn from it, and release it."""
        self.sample_finished(request, num_tokens)
        self.release(request)

    def handoff_failed(self, prefill: str, decode: str) -> None:
        """Between these two: the pair costs more for a while, see `PairFailures`."""
        self._links.failures.count(prefill, decode)

    def release(self, request: str) -> None:
        """It is over, or nobody cares any more. Nothing happens for one that is not booked."""
        self.first_token(request)
        booking = self._bookings.pop(request, None)
        if booking is not None and booking.decode in self._decode:
            self._decode.take(
                booking.decode, blocks=-booking.decode_blocks, requests=-booking.running, future=-booking.future
            )

    def quarantine(self, engine_id: str, blocks: int) -> None:
        """A worker says that so many of its blocks cannot be used until a peer that was lost is surely gone."""
        table = self._prefill if engine_id in self._prefill else self._decode
        before = self._quarantined.get(engine_id, 0)
        if blocks != before and engine_id in table:
            table.quarantine(engine_id, blocks - before)
            self._quarantined[engine_id] = blocks

    def pace(self, engine_id: str, prefill: float, decode: float) -> None:
        """A worker says how its steps compare with what it has measured; see `Load`."""
        (self._prefill if engine_id in self._prefill else self._decode).pace(engine_id, prefill, decode)

    def _as_known(self, request: RoutingRequest) -> RoutingRequest:
        """The request with what these books know of its future."""
        return RoutingRequest(
            request.prompt_tokens,
            request.max_tokens,
            self._lengths.outlook(request.max_tokens),
            self._max_queued_s,
            request.prefix,
            self._disaggregation,
            self._arrivals.per_s(),
            self._prefixes.cached_tokens(request.prefix) if request.prefix is not None else None,
            request.num_samples,
            request.all_computed,
            request.avoid,
        )

    def _future(self, booking: _Booking, num_tokens: int) -> npt.NDArray[np.float64]:
        """What a request will hold, now that it has so many tokens; see `OutputLengthForecast.held`."""
        outlook = self._lengths.outlook(booking.max_tokens, num_tokens - booking.prompt_tokens)
        traits = self._decode.traits(booking.decode)
        half_a_block = traits.block_size / 2  # of its last block, that much is empty
        if booking.running == 1:
            return outlook.held(num_tokens + half_a_block, traits.tokens_per_sequence)
        own = num_tokens - booking.prompt_tokens + half_a_block
        held = booking.prompt_tokens + own * booking.running
        return outlook.held(held, traits.tokens_per_sequence * booking.running, booking.running)
