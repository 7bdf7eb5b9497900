"""What is known of every pair of workers: why it cannot work together, and what the link between the two costs."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from cluster.routing.pair_failures import PairFailures
from cluster.routing.types import Incompatibilities, Incompatibility
from cluster.routing.worker_table import WorkerTable
from kv_transfer.link_cost import LinkCost

_FIRST_SLOTS = 8
_Floats = npt.NDArray[np.float64]


class Links:
    """Arrays by the two workers' slots (see `WorkerTable`), which stay where they are while workers come and go.

    A link goes from a prefill worker to a decode worker, and was measured when the two met. Its `LinkCost.write_s` is
    taken for its delay: seconds until something small is there. A link that nobody has measured counts as the quickest
    that was.

    Attributes:
        incompatibilities: as last given.
        least_delay_s: no link has a shorter delay.
        least_byte_s: no link takes fewer seconds for a byte.
        failures: what failed handoffs add to a pair's delay.

    Args:
        failures: what has failed so far; None: nothing.
    """

    def __init__(self, failures: PairFailures | None = None) -> None:
        self.incompatibilities: Incompatibilities = {}
        self.failures = PairFailures(time.monotonic) if failures is None else failures
        self.least_delay_s = self.least_byte_s = 0.0
        self._slots: tuple[dict[str, int], dict[str, int]] = ({}, {})
        self._known: dict[str, set[str]] = {}  # by prefill worker: whose links from it are in the arrays
        shape = (_FIRST_SLOTS, _FIRST_SLOTS)
        self._link_s, self._byte_s, self._delay_s = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        self._forever = np.zeros(shape, dtype=np.bool_)

    @property
    def differ(self) -> bool:
        """Whether it matters who works with whom."""
        return bool(self.incompatibilities) or self._has_links or bool(self.failures.current())

    @property
    def _has_links(self) -> bool:
        return any(self._known.values())

    def update(
        self,
        prefill: WorkerTable,
        decode: WorkerTable,
        incompatibilities: Incompatibilities,
        links: Mapping[str, Mapping[str, LinkCost]] | None = None,
    ) -> None:
        """What is known now.

        Args:
            prefill: the prefill pool.
            decode: the decode pool.
            incompatibilities: all that there are.
            links: by prefill worker, then by decode worker. One that was known before is not looked at again.
        """
        for at in self._cells(self.incompatibilities):
            self._delay_s[at], self._forever[at] = self._link_s[at], False
        self._seat(prefill.slots, decode.slots)
        for engine_id, those in (links or {}).items():
            known = self._known.get(engine_id)
            if known is not None and len(known) != len(those):
                self._learn(engine_id, {peer: those[peer] for peer in those.keys() - known})
        self.incompatibilities = dict(incompatibilities)
        for at, incompatibility in self._cells(self.incompatibilities).items():
            self._delay_s[at], self._forever[at] = np.inf, incompatibility.forever

    def costs(self, rows: npt.NDArray[np.int64], columns: npt.NDArray[np.int64]) -> tuple[_Floats, _Floats]:
        """Of the pairs (rows[i], columns[i]): seconds until something small is there, and for each byte.

        The former is infinite where the two cannot work together.
        """
        at = rows, columns
        delays, seconds = self._delay_s[at], self._byte_s[at]
        np.maximum(delays, self.least_delay_s, out=delays)
        np.maximum(seconds, self.least_byte_s, out=seconds)
        prefill, decode = self._slots
        for (p, d), failed_s in self.failures.current().items():
            if p in prefill and d in decode:
                delays[(rows == prefill[p]) & (columns == decode[d])] += failed_s
        return delays, seconds

    def some_fit(self, rows: npt.NDArray[np.int64], columns: npt.NDArray[np.int64]) -> bool:
        """Whether a pair of these could work together, sooner or later."""
        if not self.incompatibilities:
            return bool(len(rows) and len(columns))
        return not self._forever[rows[:, None], columns].all()

    def _cells(self, incompatibilities: Incompatibilities) -> dict[tuple[int, int], Incompatibility]:
        """Those whose workers are here, by their slots."""
        prefill, decode = self._slots
        return {
            (prefill[p], decode[d]): incompatibility
            for (p, d), incompatibility in incompatibilities.items()
            if p in prefill and d in decode
        }

    def _learn(self, engine_id: str, links: Mapping[str, LinkCost]) -> None:
        prefill, decode = self._slots
        for peer, link in links.items():
            if peer in decode:
                at, byte_s = (prefill[engine_id], decode[peer]), 1.0 / link.bytes_per_s
                self._link_s[at] = self._delay_s[at] = link.write_s
                self._byte_s[at] = byte_s
                first = not self._has_links
                self.least_delay_s = link.write_s if first else min(self.least_delay_s, link.write_s)
                self.least_byte_s = byte_s if first else min(self.least_byte_s, byte_s)
                self._known[engine_id].add(peer)

    def _seat(self, prefill: Mapping[str, int], decode: Mapping[str, int]) -> None:
        """Forget what was known of workers that are gone, and make room for those that have come."""
        size = max((*prefill.values(), *decode.values()), default=-1) + 1
        if size > len(self._link_s):
            self._grow(max(size, 2 * len(self._link_s)))
        before_p, before_d = self._slots
        self.failures.forget((before_p.keys() - prefill.keys()) | (before_d.keys() - decode.keys()))
        for engine_id, slot in prefill.items() - before_p.items():
            self._link_s[slot], self._byte_s[slot], self._delay_s[slot] = 0.0, 0.0, 0.0
            self._known[engine_id] = set()
        for _, slot in decode.items() - before_d.items():
            self._link_s[:, slot], self._byte_s[:, slot], self._delay_s[:, slot] = 0.0, 0.0, 0.0
        for engine_id in before_p.keys() - prefill.keys():
            del self._known[engine_id]
        if gone := before_d.keys() - decode.keys():
            for known in self._known.values():
                known -= gone
        if not self._has_links:
            self.least_delay_s = self.least_byte_s = 0.0
        self._slots = dict(prefill), dict(decode)

    def _grow(self, size: int) -> None:
        room = ((0, size - len(self._link_s)),) * 2
        self._link_s, self._byte_s = np.pad(self._link_s, room), np.pad(self._byte_s, room)
        self._delay_s, self._forever = np.pad(self._delay_s, room), np.pad(self._forever, room)
