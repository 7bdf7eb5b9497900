"""What serving a request would take on each worker and each pair, in predicted seconds.

Everything comes from what the workers have measured of themselves and of the links between them, and from what the
gateway has placed on them. The cost of a placement is the time that it takes the request itself, to the first token and
through the next decode steps, and the time by which it holds up others. Every array has an element for each worker of a
pool, or for each pair.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import numpy.typing as npt

from cluster.routing.links import Links
from cluster.routing.types import RoutingRequest
from cluster.routing.worker_table import WorkerTable

_Floats = npt.NDArray[np.float64]
_Places = npt.NDArray[np.intp]
_AVOIDED_S = 1e4
"""What a pair costs more on which the request has failed: more than any queue."""


class Prefilling:
    """On prefill workers.

    Attributes:
        cached: of the prompt, tokens that each has in its cache and does not compute.
        compute_s: what each has to compute of the prompt.
        ttft_s: to the first token on each: the prompts before it, and its own.
    """

    def __init__(self, request: RoutingRequest, prefill: WorkerTable) -> None:
        self.cached: _Floats = prefill.cached_tokens(None if request.all_computed else request.cached)
        self.compute_s: _Floats = prefill.missing_seconds(request.prompt_tokens, self.cached)
        self.ttft_s: _Floats = self.compute_s + prefill.column("queued_s")


class Decoding:
    """On decode workers, wherever the prompt is computed.

    Attributes:
        cached: of the prompt, tokens that each has in its cache.
        missing: tokens that it has not.
        itl_s: a decode step of each with this sequence and its tokens in its batch; see `WorkerState.step_s`.
        steps_s: the decode steps that a placement is judged by.
    """

    def __init__(self, request: RoutingRequest, decode: WorkerTable) -> None:
        own = request.prompt_tokens + request.steps / 2
        self.cached: _Floats = decode.cached_tokens(request.cached)
        self.missing: _Floats = request.prompt_tokens - self.cached
        self.itl_s: _Floats = decode.column("kv_token_s") * own
        self.itl_s += decode.column("step_s")
        self.steps_s: _Floats = self.itl_s * request.steps


class Handoffs:
    """Between the two, and what else the second token waits for.

    Attributes:
        least_s: what a handoff to each decode worker leaves at least, from whatever prefill worker.
    """

    def __init__(
        self, request: RoutingRequest, prefill: WorkerTable, decode: WorkerTable, links: Links,
        prefilling: Prefilling, decoding: Decoding,
    ) -> None:  # fmt: skip
        self._prefill, self._decode, self._links = prefill, decode, links
        self._prefilling, self._nothing_moves = prefilling, request.max_tokens == 1
        self._avoided = _codes(request.avoid, prefill, decode)
        self._anybody_queued = bool(np.count_nonzero(decode.column("queued_s")))
        self._layer_bytes: _Floats = decoding.missing * decode.column("kv_layer_bytes")
        self.least_s: _Floats = self._layer_bytes * (0.0 if self._nothing_moves else links.least_byte_s)
        self.least_s += 0.0 if self._nothing_moves else links.least_delay_s

    @property
    def differ(self) -> bool:
        """Whether it matters who works with whom."""
        return self._anybody_queued or self._links.differ or bool(len(self._avoided))

    def pair_s(self, ps: _Places, ds: _Places) -> _Floats:
        """Of the pairs (ps[i], ds[i]): what the second token waits for beside the first.

        That is the handoff, and prompts that the decode worker has to compute before.
        """
        seconds = self.handoff_s(ps, ds)
        if self._anybody_queued:
            behind = self._decode.column("queued_s")[ds]
            behind -= self._prefilling.ttft_s[ps]
            seconds += np.maximum(behind, 0.0, out=behind)
        if len(self._avoided):
            seconds += np.isin(ps * len(self._decode) + ds, self._avoided) * _AVOIDED_S
        return seconds

    def handoff_s(self, ps: _Places, ds: _Places) -> _Floats:
        """Of the pairs (ps[i], ds[i]): what prefill does not hide of moving the blocks that the decode worker lacks.

        They leave layer by layer while the prompt is computed. After the last layer at least that layer is on its way,
        and all that the link could not carry meanwhile; this is what `kv_transfer.link_cost.layers_per_write` reckons,
        with the best size of a group. Infinite where the two cannot work together; nothing where there is no second
        token.
        """
        delays, last_layer = self._links.costs(self._prefill.column("slot")[ps], self._decode.column("slot")[ds])
        if self._nothing_moves:
            return np.where(np.isinf(delays), delays, 0.0)
        last_layer *= self._layer_bytes[ds]
        moving = last_layer * self._decode.column("num_layers")[ds]
        moving -= self._prefilling.compute_s[ps]
        delays += np.maximum(moving, last_layer, out=moving)
        return delays


def _codes(pairs: Collection[tuple[str, str]], prefill: WorkerTable, decode: WorkerTable) -> _Places:
    """Of the pairs that are here: the row of the first times the number of columns, plus the column of the second."""
    if not pairs:
        return np.empty(0, dtype=np.intp)
    rows = {engine_id: row for row, engine_id in enumerate(prefill.engine_ids)}
    columns = {engine_id: column for column, engine_id in enumerate(decode.engine_ids)}
    found = [rows[p] * len(columns) + columns[d] for p, d in pairs if p in rows and d in columns]
    return np.array(found, dtype=np.intp)


class Local:
    """On decode workers that compute the prompt themselves.

    Attributes:
        cached: of the prompt, tokens that each has in its cache and does not compute.
        compute_s: what each would have to compute of the prompt.
        ttft_s: to the first token on each: the prompts before it, its own, and a step of its batch for each chunk.
        others_s: what the sequences on each would be held up by the prompt, in all: none decodes meanwhile. Those that
            are there wait for all of it; those that are likely to come meanwhile, each decode worker's share of all
            arrivals, for half of it on average.
    """

    def __init__(self, request: RoutingRequest, decode: WorkerTable, decoding: Decoding) -> None:
        self.cached: _Floats = decode.cached_tokens(None) if request.all_computed else decoding.cached
        self.compute_s: _Floats = decode.missing_seconds(request.prompt_tokens, self.cached)
        chunks = (request.prompt_tokens - self.cached) / decode.column("chunk_tokens")
        self.ttft_s: _Floats = np.ceil(chunks, out=chunks)
        self.ttft_s *= decode.column("busy_step_s")
        self.ttft_s += self.compute_s
        self.ttft_s += decode.column("queued_s")
        self.others_s: _Floats = self.compute_s * (0.5 * request.arrivals_per_s / max(1, len(decode)))
        self.others_s += decode.column("running")
        self.others_s *= self.compute_s
