"""What serving a request would take on each worker and each pair, in predicted seconds.

Everything comes from what the workers have measured of themselves and of the way between them, and from what the
gateway has placed on them. The cost of a placement is the time that it takes the request itself, to the first token and
through the next decode steps, and the time by which it holds up others.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import numpy.typing as npt

from cluster.routing.demand import Demand
from cluster.routing.pairs import Pairs
from cluster.routing.worker_table import WorkerTable

_EXPECTED_AT = 1
"""Of the books' outlook the span that begins after 16 steps and ends after 32: the middle of the look-ahead."""

_Floats = npt.NDArray[np.float64]
_Tokens = npt.NDArray[np.int64]
_Places = npt.NDArray[np.intp]


class Costs:
    """Of one request; every array has an element for each worker of a pool, or for each pair.

    Args:
        demand: what the request needs.
        prefill: the prefill pool.
        decode: the decode pool.
        pairs: what is known of pairs of them.
    """

    def __init__(self, demand: Demand, prefill: WorkerTable, decode: WorkerTable, pairs: Pairs) -> None:
        self._demand, self._prefill, self._decode, self._pairs = demand, prefill, decode, pairs

    @cached_property
    def cached(self) -> _Tokens:
        """Of the prompt, tokens that each prefill worker has in its cache."""
        return _cached(self._prefill, self._demand)

    @cached_property
    def decode_cached(self) -> _Tokens:
        """Of the prompt, tokens that each decode worker has in its cache."""
        return _cached(self._decode, self._demand)

    @cached_property
    def compute_s(self) -> _Floats:
        """What each prefill worker has to compute of the prompt."""
        return self._prefill.missing_seconds(self._demand.prompt_tokens, self.cached)

    @cached_property
    def ttft_s(self) -> _Floats:
        """To the first token on each prefill worker: the prompts before it, and its own."""
        seconds: _Floats = self._prefill.column("queued_s") + self.compute_s
        return seconds

    @cached_property
    def itl_s(self) -> _Floats:
        """A decode step of each decode worker with this sequence in its batch.

        By the number of sequences and by the tokens in the cache that the step reads: those that the worker's requests
        are expected to hold in the middle of the look-ahead, with those that will have ended by then left out, and this
        one's.
        """
        own = self._demand.prompt_tokens + self._demand.steps / 2
        expected = self._decode.column("future")[:, 0, _EXPECTED_AT]
        seconds: _Floats = self._decode.column("step_s") + self._decode.column("kv_token_s") * (expected + own)
        return seconds

    @cached_property
    def decode_s(self) -> _Floats:
        """The decode steps that a placement is judged by, on each decode worker."""
        return self.itl_s * self._demand.steps

    def pair_s(self, ps: _Places, ds: _Places) -> _Floats:
        """(prefill, decode): what the second token waits for beside the first: the handoff, and prompts before it."""
        behind: _Floats = self._decode.column("queued_s")[ds] - self.ttft_s[ps][:, None]
        return self.handoff_s(ps, ds) + np.maximum(behind, 0.0, out=behind)

    def handoff_s(self, ps: _Places, ds: _Places) -> _Floats:
        """(prefill, decode): what prefill does not hide of moving the blocks that the decode worker lacks.

        They leave layer by layer while the prompt is computed. After the last layer at least that layer is on its way,
        and all that the way could not carry meanwhile; this is what `kv_transfer.path_cost.layers_per_group` reckons,
        with the best size of a group. Infinite where the two cannot work together; nothing where there is no second
        token.
        """
        rows, columns = self._prefill.column("slot")[ps], self._decode.column("slot")[ds]
        delays = self._pairs.delays(rows, columns)
        if self._demand.max_tokens == 1:
            return np.where(np.isinf(delays), delays, 0.0)
        missing = self._demand.prompt_tokens - self.decode_cached[ds]
        moving = self._pairs.byte_seconds(rows, columns)
        moving *= missing * self._decode.column("kv_token_bytes")[ds]
        last_layer = moving / self._decode.column("num_layers")[ds]
        moving -= self.compute_s[ps][:, None]
        delays += np.maximum(moving, last_layer, out=moving)
        return delays

    @cached_property
    def least_handoff_s(self) -> _Floats:
        """What a handoff to each decode worker leaves at least, from whatever prefill worker."""
        if self._demand.max_tokens == 1:
            return np.zeros(len(self._decode))
        moving = (self._demand.prompt_tokens - self.decode_cached) * self._decode.column("kv_token_bytes")
        seconds: _Floats = moving * self._pairs.least_byte_s / self._decode.column("num_layers")
        return seconds + self._pairs.least_delay_s

    def more_s(self, ps: _Places, ds: _Places) -> _Floats:
        """(prefill, decode): what `pair_s` has beyond the least handoff."""
        seconds = self.pair_s(ps, ds)
        seconds -= self.least_handoff_s[ds]
        return seconds

    @cached_property
    def local_compute_s(self) -> _Floats:
        """What each decode worker would have to compute of the prompt itself."""
        return self._decode.missing_seconds(self._demand.prompt_tokens, self.decode_cached)

    @cached_property
    def local_ttft_s(self) -> _Floats:
        """To the first token on each decode worker alone: the prompts before it, its own, and a step for each chunk."""
        seconds: _Floats = self._decode.column("queued_s") + self.local_compute_s
        chunks = -((self.decode_cached - self._demand.prompt_tokens) // self._decode.column("chunk_tokens"))
        return seconds + np.where(self._decode.column("running") > 0, chunks * self._decode.column("step_s"), 0.0)

    @cached_property
    def others_s(self) -> _Floats:
        """What the sequences on each decode worker would be held up by the prompt, in all: none decodes meanwhile.

        Those that are there wait for all of it; those that are likely to come meanwhile, each decode worker's share of
        all arrivals, for half of it on average.
        """
        newcomers = self.local_compute_s * (0.5 * self._demand.arrivals_per_s / max(1, len(self._decode)))
        seconds: _Floats = (self._decode.column("running") + newcomers) * self.local_compute_s
        return seconds

    @cached_property
    def local_s(self) -> _Floats:
        """The cost of each decode worker alone."""
        seconds: _Floats = self.local_ttft_s + self.others_s + self.decode_s
        return seconds


def _cached(table: WorkerTable, demand: Demand) -> _Tokens:
    if demand.prefix is None:
        return np.zeros(len(table), dtype=np.int64)
    return table.cached_tokens(demand.prefix)
