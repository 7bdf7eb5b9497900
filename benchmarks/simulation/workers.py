"""Workers that only reckon: they take as long as a real one was measured to take, and compute nothing.

A prefill worker computes its prompts one after the other. A decode worker's batch advances by a few steps at a time;
who arrives in between joins at the next boundary. It keeps its blocks as the real one does, sequences grow and are
preempted, at the cost of moving them. Both crash, and come back, when they are told to. An answer's length is its
request's seed, if `max_tokens` allows it: chance decides it, and the service cannot know it before.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from benchmarks.simulation.decode_memory import DecodeMemory
from benchmarks.simulation.decode_memory import Sequence as Decoding
from cluster.errors import WorkerLostError
from cluster.worker_handle import LoadProgress
from kv_transfer.layout import KVLayout
from kv_transfer.transport import EngineInfo
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
from workers.sampling.params import SamplingParams

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
        host_bytes_per_s: how fast a sequence's blocks move to host memory or back; the batch waits for it.
        load_s: from start to ready.
        steps_at_once: decode steps that are reckoned together.
    """

    capability: Capability
    num_blocks: int = 8192
    block_size: int = 64
    max_num_seqs: int = 256
    kv_bytes_per_token: int = 131_072
    link_bytes_per_s: float = 250e9
    host_bytes_per_s: float = 50e9
    load_s: float = 20.0
    steps_at_once: int = 4

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer: what fits the cache."""
        return min(131_072, self.num_blocks * self.block_size)


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
        self._hardware = hardware
        self._fabric = fabric
        self._out: asyncio.Queue[StepOutput | None] = asyncio.Queue()
        self._prompts: deque[PrefillRequest] = deque()
        self._memory = DecodeMemory(hardware.num_blocks, hardware.block_size)
        self._news = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._alive = False
        self.gone = False

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
            max_model_len=self._hardware.max_model_len,
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
            tokens = len(request.prompt_token_ids) + 1
            left = answer_tokens(request.sampling) - request.num_output_tokens - 1
            remaining = min(left, self._hardware.max_model_len - tokens)
            self._memory.enter(Decoding(request, tokens, remaining))
        self._news.set()

    def abort(self, request_id: str) -> None:
        """See `WorkerHandle.abort`."""
        if self.role == "prefill":
            self._prompts = deque(prompt for prompt in self._prompts if prompt.request_id != request_id)
        else:
            self._memory.leave(request_id)
            self._news.set()

    def disconnect(self, engine_id: str) -> None:
        """See `WorkerHandle.disconnect`."""
        for sequence in self._memory.all():
            if sequence.request.prefill_engine == engine_id and not sequence.handed_over:
                self._memory.leave(sequence.request.request_id)
                self._news.set()
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
            self._alive, self.gone = False, True
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
        if sequence := self._memory.find(request_id):
            sequence.handed_over = True
            self._news.set()

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
            tokens, started = len(request.prompt_token_ids), clock()
            await asyncio.sleep(self._hardware.capability.prefill_seconds(tokens))
            if not self._prompts or self._prompts[0] is not request:
                continue  # aborted meanwhile
            self._prompts.popleft()
            last = _reason(request.sampling) if request.decode_engine is None else None
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
        hardware = self._hardware
        block_s = hardware.block_size * hardware.kv_bytes_per_token / hardware.host_bytes_per_s
        while True:
            batch, steps, moved = self._memory.next_batch(hardware.steps_at_once)
            if not batch:
                self._news.clear()
                await self._news.wait()
                continue
            await asyncio.sleep(moved * block_s + steps * hardware.capability.decode_seconds(len(batch)))
            self._say(*(event for sequence in batch for event in self._advance(sequence, steps)))

    def _advance(self, sequence: Decoding, steps: int) -> list[TokenOutput]:
        name = sequence.request.request_id
        if self._memory.find(name) is not sequence:
            return []  # aborted meanwhile
        sequence.remaining -= steps
        sequence.num_tokens += steps
        over = sequence.remaining == 0
        if over:
            self._memory.leave(name)
        last = TokenOutput(name, 0, finish_reason=_reason(sequence.request.sampling) if over else None)
        return [TokenOutput(name, 0)] * (steps - 1) + [last]

    def _say(self, *events: WorkerEvent) -> None:
        load = Load(
            self._hardware.num_blocks, self._memory.num_free, waiting=len(self._prompts), running=len(self._memory)
        )
        self._out.put_nowait(StepOutput(self.engine_id, events, load))

    def _spawn(self, coroutine: object) -> None:
        task = asyncio.ensure_future(coroutine)  # type: ignore[call-overload]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def answer_tokens(sampling: SamplingParams) -> int:
    """How long the answer will be; see the module."""
    longest = sampling.max_tokens or 1
    return longest if sampling.seed is None else max(1, min(longest, sampling.seed))


def _reason(sampling: SamplingParams) -> FinishReason:
    return FinishReason.LENGTH if answer_tokens(sampling) == sampling.max_tokens else FinishReason.STOP
