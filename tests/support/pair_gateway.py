"""The gateway's part for one pair of worker processes: sends requests to both, cancels, puts the tokens in order."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait

from made_requests import worker_request
from worker_process import WorkerProcess
from workers.messages import Load, RequestFailed, TokenOutput, WorkerEvent
from workers.sampling_params import SamplingParams


@dataclass
class Asked:
    """One request, and what has come of it so far.

    Attributes:
        first: the token from prefill; None until it is here.
        decoded: those from decode.
        ended: a token with a finish reason is here, or the request was cancelled or has failed.
        failure: what a worker said.
    """

    name: str
    first: int | None = None
    decoded: list[int] = field(default_factory=list)
    ended: bool = False
    cancelled: bool = False
    failure: str | None = None

    @property
    def tokens(self) -> list[int]:
        return [*([] if self.first is None else [self.first]), *self.decoded]

    @property
    def open(self) -> bool:
        """Whether something is still to come: a decoded token may overtake the first one."""
        return not (self.cancelled or self.failure) and not (self.ended and self.first is not None)


class PairGateway:
    """Talks to a prefill and a decode worker that have met.

    Args:
        prefill: ready.
        decode: ready.
        rng: decides handoff ids, and which worker hears of a request first.
    """

    def __init__(self, prefill: WorkerProcess, decode: WorkerProcess, rng: random.Random) -> None:
        self._prefill, self._decode, self._rng = prefill, decode, rng
        self.loads: dict[str, Load] = {}
        self.asked: dict[str, Asked] = {}
        self.num_open = 0
        prefill.call("connect", decode.info.engines)
        decode.call("connect", prefill.info.engines)
        prefill.call("probe", decode.info.engine.engine_id)

    def submit(self, name: str, prompt: Sequence[int], sampling: SamplingParams, timeout_s: float = 300.0) -> Asked:
        """Send a request to both workers, in either order."""
        prefill, decode = self._prefill.info.engine.engine_id, self._decode.info.engine.engine_id
        handoff = self._rng.randbytes(16)
        sides = [
            (worker, worker_request(name, prompt, sampling, peer, handoff_id=handoff, timeout_s=timeout_s))
            for worker, peer in ((self._prefill, decode), (self._decode, prefill))
        ]
        self._rng.shuffle(sides)
        for worker, request in sides:
            worker.post("submit", [request])
        self.asked[name] = Asked(name)
        self.num_open += 1
        return self.asked[name]

    def cancel(self, name: str) -> None:
        """Tell both workers, in either order, and expect nothing more."""
        asked = self.asked[name]
        if asked.open:
            asked.cancelled = True
            self.num_open -= 1
        self._tell_to_stop(name)

    def take(self, timeout_s: float) -> None:
        """Wait for events, and take them."""
        wait([self._prefill.pipe, self._decode.pipe], timeout_s)
        for worker in (self._prefill, self._decode):
            worker.receive()
            while worker.outputs:
                output = worker.outputs.popleft()
                self.loads[worker.info.name] = output.load
                for event in output.events:
                    self._on_event(event, worker is self._prefill)

    def run_until_open(self, at_most: int, timeout_s: float) -> None:
        """Take events until no more than so many requests are open."""
        give_up_at = time.monotonic() + timeout_s
        while self.num_open > at_most:
            assert time.monotonic() < give_up_at, f"{self.num_open} requests are still open; {self.loads}"
            self.take(1.0)

    def wait_idle(self, timeout_s: float) -> None:
        """Until both workers have said that every block is free and nothing is under way."""
        give_up_at = time.monotonic() + timeout_s
        while not self._idle():
            assert time.monotonic() < give_up_at, f"blocks are not back: {self.loads}"
            self.take(0.2)

    def _idle(self) -> bool:
        return len(self.loads) == 2 and all(
            load.free_blocks == load.total_blocks
            and load.reserved_blocks == load.quarantined_blocks == load.running == load.waiting == load.preempted == 0
            for load in self.loads.values()
        )

    def _on_event(self, event: WorkerEvent, from_prefill: bool) -> None:
        if not isinstance(event, TokenOutput | RequestFailed):
            return
        asked = self.asked[event.request_id]
        if not asked.open:
            return
        if isinstance(event, RequestFailed):
            asked.failure = repr(event.error)
            self._tell_to_stop(asked.name)
        elif from_prefill:
            asked.first = event.token_id
            asked.ended = asked.ended or event.finish_reason is not None
        else:
            asked.decoded.append(event.token_id)
            asked.ended = event.finish_reason is not None
        if not asked.open:
            self.num_open -= 1

    def _tell_to_stop(self, name: str) -> None:
        for worker in self._rng.sample((self._prefill, self._decode), 2):
            worker.post("abort", [name])
