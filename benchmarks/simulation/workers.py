"""Workers that only reckon: they take as long as a real one was measured to take, and compute nothing.

A prefill worker computes its prompts one after the other, and hands them over while it does. A decode worker's batch
advances by a few steps at a time; who arrives in between joins at the next boundary. Where it has prompts of its own to
compute, a chunk goes with each step. It keeps its blocks as the real one does, sequences grow and are preempted, at the
cost of moving them. Either keeps the blocks of prompts for those that begin alike. Both crash, and come back, when they
are told to. An answer's length is its request's seed, if `max_tokens` allows it: chance decides it, and the service
cannot know it before.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator, Sequence

from benchmarks.simulation.answers import answer_tokens, finish_reason
from benchmarks.simulation.decode_memory import DecodeMemory
from benchmarks.simulation.decode_memory import Sequence as Decoding
from benchmarks.simulation.hardware import Hardware
from benchmarks.simulation.local_prompts import LocalPrompts
from benchmarks.simulation.prefix_store import PrefixStore
from cluster.errors import WorkerLostError
from cluster.worker_handle import LoadProgress
from kv_transfer.link_cost import LinkCost
from kv_transfer.transports.base import EngineInfo
from workers.errors import HandoffError
from workers.heartbeat import Heartbeat
from workers.messages import (
    FinishReason,
    HandoffReport,
    Load,
    PrefillReport,
    RequestFailed,
    StepOutput,
    TokenOutput,
    WorkerEvent,
    WorkerRequest,
)
from workers.worker_host import WorkerInfo

__all__ = ["Fabric", "Hardware", "SimulatedWorker"]

_incarnations = itertools.count(1)

Fabric = dict[str, "SimulatedWorker"]
"""By engine id: how a prefill worker finds its peer."""


class SimulatedWorker:
    """A `WorkerHandle` in simulated time.

    Args:
        name: such as "prefill-0".
        role: "prefill" or "decode".
        hardware: what it is made of.
        fabric: shared with its peers.
    """

    def __init__(self, name: str, role: str, hardware: Hardware, fabric: Fabric) -> None:
        self.name, self.role = name, role
        self.engine_id = f"{name}.{next(_incarnations):016x}"
        self.hardware = hardware
        self._fabric = fabric
        self._out: asyncio.Queue[StepOutput | None] = asyncio.Queue()
        self._prompts: deque[WorkerRequest] = deque()
        self._memory = DecodeMemory(hardware.num_blocks, hardware.block_size)
        self._local = LocalPrompts(hardware)
        self._store = PrefixStore(hardware.num_blocks, hardware.block_size)
        self._news = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._alive = False
        self.gone = False

    async def start(self, progress: LoadProgress) -> WorkerInfo:
        """See `WorkerHandle.start`."""
        await asyncio.sleep(self.hardware.load_s)
        self._alive = True
        self._fabric[self.engine_id] = self
        self._spawn(self._prefill() if self.role == "prefill" else self._decode())
        return self.hardware.described(self.name, self.role, self.engine_id)

    async def new_endpoint(self, peer: Sequence[EngineInfo]) -> tuple[EngineInfo, ...]:
        """See `WorkerHandle.new_endpoint`."""
        return (self.hardware.described(self.name, self.role, self.engine_id).engine,)

    async def connect(self, peer: Sequence[EngineInfo]) -> None:
        """See `WorkerHandle.connect`."""

    async def probe(self, engine_id: str) -> float:
        """See `WorkerHandle.probe`."""
        return 0.0

    async def link_to(self, engine_id: str) -> LinkCost | None:
        """See `WorkerHandle.link_to`."""
        if (peer := self._fabric.get(engine_id)) is None:
            return None
        return LinkCost(0.0, 0.0, self.hardware.bytes_per_s(peer.hardware))

    def submit(self, request: WorkerRequest) -> None:
        """See `WorkerHandle.submit`."""
        if not self._alive:
            return
        if self.role == "prefill":
            self._prompts.append(request)
        else:
            tokens = len(request.prompt_token_ids) + 1
            left = answer_tokens(request.sampling) - request.num_output_tokens - 1
            remaining = min(left, self.hardware.max_model_len - tokens)
            sequence = Decoding(request, tokens, remaining, cached_tokens=self._store.find(request.prompt_token_ids))
            if request.peer_engine is None:
                self._local.add(sequence)
            self._memory.enter(sequence)
        self._news.set()

    def abort(self, attempt_id: str, index: int | None = None) -> None:
        """See `WorkerHandle.abort`; requests of several samples are not simulated."""
        if self.role == "prefill":
            self._prompts = deque(prompt for prompt in self._prompts if prompt.attempt_id != attempt_id)
        else:
            self._local.remove(attempt_id)
            self._memory.leave(attempt_id)
            self._news.set()

    def disconnect(self, engine_id: str, confirmed_dead: bool = False) -> None:
        """See `WorkerHandle.disconnect`."""
        for sequence in self._memory.all():
            if sequence.request.peer_engine == engine_id and not sequence.handed_over:
                self._memory.leave(sequence.request.attempt_id)
                self._news.set()
                self._say(_failed(sequence.request, HandoffError(f"{engine_id} is gone")))

    async def outputs(self) -> AsyncIterator[list[StepOutput | Heartbeat]]:
        """See `WorkerHandle.outputs`."""
        while (output := await self._out.get()) is not None:
            yield [output]
        raise WorkerLostError(f"{self.name} is gone")

    async def has_ended(self) -> bool:
        """See `WorkerHandle.has_ended`."""
        return True

    async def stop(self) -> bool:
        """See `WorkerHandle.stop`."""
        self.kill()
        return True

    def kill(self) -> None:
        """The process is gone, with everything in it."""
        if self._alive:
            self._alive, self.gone = False, True
            del self._fabric[self.engine_id]
            for task in self._tasks:
                task.cancel()
            self._out.put_nowait(None)

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._alive

    def receive(self, attempt_id: str) -> None:
        """A sequence's KV cache is whole."""
        if sequence := self._memory.find(attempt_id):
            sequence.handed_over = True
            self._store.keep(sequence.request.prompt_token_ids)
            if sequence.remaining < 1:  # its first token was the last
                self._memory.leave(attempt_id)
            self._news.set()

    def lacks(self, request: WorkerRequest) -> int:
        """Tokens of a prompt that are to be moved here."""
        sequence = self._memory.find(request.attempt_id)
        return len(request.prompt_token_ids) - (sequence.cached_tokens if sequence else 0)

    @property
    def num_preempted(self) -> int:
        """Times that a sequence had to make room."""
        return self._memory.num_preempted

    async def _prefill(self) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            while not self._prompts:
                self._news.clear()
                await self._news.wait()
            request = self._prompts[0]
            tokens, started, cached = len(request.prompt_token_ids), clock(), self._store.find(request.prompt_token_ids)
            await asyncio.sleep(self.hardware.prompt_s(tokens, cached))
            if not self._prompts or self._prompts[0] is not request:
                continue  # aborted meanwhile
            self._prompts.popleft()
            self._store.keep(request.prompt_token_ids)
            ends = request.peer_engine is None or request.num_output_tokens + 1 >= answer_tokens(request.sampling)
            last = finish_reason(request.sampling) if ends else None
            compute_s = clock() - started
            self._say(
                PrefillReport(request.request_id, 0.0, compute_s, 1, cached, attempt_id=request.attempt_id),
                _token(request, last),
            )
            if request.peer_engine is not None:
                self._spawn(self._hand_over(request, compute_s))

    async def _hand_over(self, request: WorkerRequest, compute_s: float) -> None:
        exposed_s, num_bytes = 0.0, 0
        if peer := self._fabric.get(request.peer_engine or ""):
            lacks = peer.lacks(request)
            exposed_s = self.hardware.exposed_s(peer.hardware, lacks, compute_s)
            num_bytes = lacks * self.hardware.kv_bytes_per_token
            await asyncio.sleep(exposed_s)
            peer.receive(request.attempt_id)
        self._say(HandoffReport(request.request_id, num_bytes, 1, exposed_s, exposed_s, attempt_id=request.attempt_id))

    async def _decode(self) -> None:
        hardware = self.hardware
        block_s = hardware.block_size * hardware.kv_bytes_per_token / hardware.host_bytes_per_s
        while True:
            batch, steps, moved = self._memory.next_batch(1 if self._local else hardware.steps_at_once)
            chunk_s, ended = self._local.compute(lambda sequence: sequence.blocks > 0) if self._local else (0.0, [])
            if not batch and not chunk_s:
                self._news.clear()
                await self._news.wait()
                continue
            tokens = sum(sequence.num_tokens for sequence in batch)
            step_s = hardware.step_times.decode_seconds(len(batch), tokens) if batch else 0.0
            await asyncio.sleep(moved * block_s + chunk_s + steps * step_s)
            events = [event for sequence in batch for event in self._advance(sequence, steps)]
            self._say(*events, *(event for sequence in ended for event in self._begin(sequence)))

    def _begin(self, sequence: Decoding) -> list[WorkerEvent]:
        """A prompt that was computed here has its first token."""
        request = sequence.request
        if self._memory.find(request.attempt_id) is not sequence:
            return []  # aborted meanwhile
        sequence.handed_over = True
        self._store.keep(request.prompt_token_ids)
        last = finish_reason(request.sampling) if sequence.remaining < 1 else None
        if last is not None:
            self._memory.leave(request.attempt_id)
        return [
            PrefillReport(request.request_id, 0.0, 0.0, 1, sequence.cached_tokens, attempt_id=request.attempt_id),
            _token(request, last),
        ]

    def _advance(self, sequence: Decoding, steps: int) -> list[TokenOutput]:
        request = sequence.request
        if self._memory.find(request.attempt_id) is not sequence:
            return []  # aborted meanwhile
        sequence.remaining -= steps
        sequence.num_tokens += steps
        over = sequence.remaining == 0
        if over:
            self._memory.leave(request.attempt_id)
        last = _token(request, finish_reason(request.sampling) if over else None)
        return [_token(request)] * (steps - 1) + [last]

    def _say(self, *events: WorkerEvent) -> None:
        load = Load(
            self.hardware.num_blocks, self._memory.num_free, waiting=len(self._prompts), running=len(self._memory)
        )
        self._out.put_nowait(StepOutput(self.engine_id, events, load, self._store.take_update()))

    def _spawn(self, coroutine: object) -> None:
        task = asyncio.ensure_future(coroutine)  # type: ignore[call-overload]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _token(request: WorkerRequest, reason: FinishReason | None = None) -> TokenOutput:
    return TokenOutput(request.request_id, 0, finish_reason=reason, attempt_id=request.attempt_id)


def _failed(request: WorkerRequest, error: Exception) -> RequestFailed:
    return RequestFailed(request.request_id, error, attempt_id=request.attempt_id)
