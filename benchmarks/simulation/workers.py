"""Workers that only reckon: they take as long as a real one was measured to take, and compute nothing.

A prefill worker computes its prompts one after the other. A decode worker's batch advances by a few steps at a time;
who arrives in between joins at the next boundary. Both keep blocks and slots as the real ones do, and crash, and come
back, when they are told to.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from cluster.errors import WorkerLostError
from cluster.worker_handle import LoadProgress
from kv_transfer.layout import KVLayout
from kv_transfer.transport import EngineInfo
from workers.block_manager import blocks_for
from workers.capability import Capability
from workers.errors import HandoffError
from workers.host import WorkerInfo
from workers.messages import (
    DecodeRequest,
    FinishReason,
    HandoffReport,
    Load,
    PrefillReport,
    PrefillRequest,
    RequestFailed,
    StepOutput,
    TokenOutput,
    WorkerEvent,
)

_incarnations = itertools.count(1)


@dataclass(frozen=True)
class Hardware:
    """What a simulated worker is made of.

    Attributes:
        capability: how long things take.
        num_blocks: of its KV cache.
        block_size: tokens in a block.
        max_num_seqs: sequences at once.
        kv_bytes_per_token: what a handoff moves.
        link_bytes_per_s: how fast.
        load_s: from start to ready.
        steps_at_once: decode steps that are reckoned together.
    """

    capability: Capability
    num_blocks: int = 8192
    block_size: int = 64
    max_num_seqs: int = 256
    kv_bytes_per_token: int = 131_072
    link_bytes_per_s: float = 250e9
    load_s: float = 20.0
    steps_at_once: int = 4


Fabric = dict[str, "SimulatedWorker"]
"""By engine id: how a prefill worker finds its peer."""


@dataclass(eq=False)
class _Sequence:
    request: DecodeRequest
    blocks: int
    remaining: int
    arrived: bool = False


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
        self._hardware = hardware
        self._fabric = fabric
        self._out: asyncio.Queue[StepOutput | None] = asyncio.Queue()
        self._prompts: deque[PrefillRequest] = deque()
        self._sequences: dict[str, _Sequence] = {}
        self._free_blocks = hardware.num_blocks
        self._news = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._alive = False
        self.peak = _Peak()

    async def start(self, progress: LoadProgress) -> WorkerInfo:
        """See `WorkerHandle.start`."""
        await asyncio.sleep(self._hardware.load_s)
        self._alive = True
        self._fabric[self.engine_id] = self
        self._spawn(self._prefill() if self.role == "prefill" else self._decode())
        layout = KVLayout("mha", 32, self._hardware.block_size, 8, 128, "bfloat16")
        engine = EngineInfo(self.engine_id, 0, layout, self._hardware.num_blocks, 0, "cuda", 0, b"")
        return WorkerInfo(
            name=self.name,
            role=self.role,
            engines=(engine,),
            device="simulated",
            attention_backend="NONE",
            max_model_len=131_072,
            max_num_seqs=self._hardware.max_num_seqs,
            num_blocks=self._hardware.num_blocks,
            capability=self._hardware.capability,
            pid=0,
        )

    async def connect(self, peer: Sequence[EngineInfo]) -> None:
        """See `WorkerHandle.connect`."""

    async def probe(self, engine_id: str) -> float:
        """See `WorkerHandle.probe`."""
        return 0.0

    def submit(self, request: PrefillRequest | DecodeRequest) -> None:
        """See `WorkerHandle.submit`."""
        if not self._alive:
            return
        if isinstance(request, PrefillRequest):
            self._prompts.append(request)
        else:
            blocks = blocks_for(
                len(request.prompt_token_ids) + (request.sampling.max_tokens or 1), self._hardware.block_size
            )
            self._sequences[request.request_id] = _Sequence(request, blocks, (request.sampling.max_tokens or 1) - 1)
            self._free_blocks -= blocks
            self.peak.see(len(self._sequences), self._free_blocks)
        self._news.set()

    def abort(self, request_id: str) -> None:
        """See `WorkerHandle.abort`."""
        self._prompts = deque(prompt for prompt in self._prompts if prompt.request_id != request_id)
        self._drop(request_id)

    def disconnect(self, engine_id: str) -> None:
        """See `WorkerHandle.disconnect`."""
        for sequence in list(self._sequences.values()):
            if sequence.request.prefill_engine == engine_id and not sequence.arrived:
                self._drop(sequence.request.request_id)
                self._say(RequestFailed(sequence.request.request_id, HandoffError(f"{engine_id} is gone")))

    async def outputs(self) -> AsyncIterator[list[StepOutput]]:
        """See `WorkerHandle.outputs`."""
        while (output := await self._out.get()) is not None:
            yield [output]
        raise WorkerLostError(f"{self.name} is gone")

    async def stop(self) -> None:
        """See `WorkerHandle.stop`."""
        self.kill()

    def kill(self) -> None:
        """The process is gone, with everything in it."""
        if self._alive:
            self._alive = False
            del self._fabric[self.engine_id]
            for task in self._tasks:
                task.cancel()
            self._out.put_nowait(None)

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._alive

    def receive(self, request_id: str) -> None:
        """A sequence's KV cache is whole."""
        if sequence := self._sequences.get(request_id):
            sequence.arrived = True
            self._news.set()

    async def _prefill(self) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            while not self._prompts:
                self._news.clear()
                await self._news.wait()
            request = self._prompts.popleft()
            tokens, started = len(request.prompt_token_ids), clock()
            await asyncio.sleep(self._hardware.capability.prefill_seconds(tokens))
            last = FinishReason.LENGTH if request.decode_engine is None else None
            self._say(
                PrefillReport(request.request_id, 0.0, clock() - started, 1),
                TokenOutput(request.request_id, 0, finish_reason=last),
            )
            if request.decode_engine is not None:
                self._spawn(self._hand_over(request, tokens))

    async def _hand_over(self, request: PrefillRequest, tokens: int) -> None:
        num_bytes = tokens * self._hardware.kv_bytes_per_token
        await asyncio.sleep(num_bytes / self._hardware.link_bytes_per_s)
        if peer := self._fabric.get(request.decode_engine or ""):
            peer.receive(request.request_id)
        self._say(HandoffReport(request.request_id, num_bytes, 1, 0.0, 0.0))

    async def _decode(self) -> None:
        while True:
            batch = [sequence for sequence in self._sequences.values() if sequence.arrived]
            if not batch:
                self._news.clear()
                await self._news.wait()
                continue
            steps = min(self._hardware.steps_at_once, *(sequence.remaining for sequence in batch))
            await asyncio.sleep(steps * self._hardware.capability.decode_seconds(len(batch)))
            events: list[WorkerEvent] = []
            for sequence in batch:
                name = sequence.request.request_id
                if name not in self._sequences:
                    continue  # aborted meanwhile
                sequence.remaining -= steps
                events += [TokenOutput(name, 0)] * (steps - 1)
                reason = FinishReason.LENGTH if sequence.remaining == 0 else None
                events.append(TokenOutput(name, 0, finish_reason=reason))
                if reason:
                    self._drop(name)
            self._say(*events)

    def _drop(self, request_id: str) -> None:
        if sequence := self._sequences.pop(request_id, None):
            self._free_blocks += sequence.blocks

    def _say(self, *events: WorkerEvent) -> None:
        load = Load(self._hardware.num_blocks, max(0, self._free_blocks), running=len(self._sequences))
        self._out.put_nowait(StepOutput(self.engine_id, events, load))

    def _spawn(self, coroutine: object) -> None:
        task = asyncio.ensure_future(coroutine)  # type: ignore[call-overload]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


@dataclass
class _Peak:
    """The most that a worker has held, to see afterwards that nobody was given more than fits."""

    sequences: int = 0
    least_free_blocks: int = field(default=1 << 60)

    def see(self, sequences: int, free_blocks: int) -> None:
        """Note a moment."""
        self.sequences = max(self.sequences, sequences)
        self.least_free_blocks = min(self.least_free_blocks, free_blocks)
