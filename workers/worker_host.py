"""One worker, whole, from its configuration: put together, given a thread, and leading its other ranks if any."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from kv_transfer.connector import KVConnector
from kv_transfer.link_cost import LinkCost
from kv_transfer.transports.base import EngineInfo
from workers.builder import BuiltWorker, Progress, WorkerMemory, build_worker
from workers.commands import Abort, Alone, Disconnect, Submit
from workers.config import WorkerConfig
from workers.grammars.intake import GrammarIntake
from workers.heartbeat import Heartbeat
from workers.lockstep.channel import LeadChannel
from workers.lockstep.connector import AgreedConnector
from workers.lockstep.lead import Lead
from workers.lockstep.replica import Replica, StepClock
from workers.messages import StepOutput, WorkerRequest
from workers.parallel.group import join_group
from workers.runner.step_times import StepTimes
from workers.worker_loop import WorkerLoop

_FOLLOWERS_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class WorkerInfo:
    """What a worker says of itself once it is ready.

    Attributes:
        name: such as "prefill-0".
        role: "prefill" or "decode".
        engines: how its peers reach it, one a rank, the lead's first: the worker goes by the lead's engine id.
        device: such as "cpu" or the card's name.
        attention_backend: the chosen one.
        max_model_len: context window, tokens.
        max_num_seqs: sequences that it takes at once.
        num_blocks: of its KV cache's primary group, for sequences to have.
        step_times: measured on its device.
        pid: of its process; of several ranks, the lead's.
        memory: what it takes on its device; of several ranks, on each one's.
        max_num_batched_tokens: of prompts, that it computes in a step.
        blocks_per_sequence: of its blocks, the most that a sequence holds at once; None: those of all its tokens.
    """

    name: str
    role: str
    engines: tuple[EngineInfo, ...]
    device: str
    attention_backend: str
    max_model_len: int
    max_num_seqs: int
    num_blocks: int
    step_times: StepTimes
    pid: int
    memory: WorkerMemory = field(default_factory=WorkerMemory)
    max_num_batched_tokens: int = 2048
    blocks_per_sequence: int | None = None

    @property
    def engine(self) -> EngineInfo:
        """Whose engine id the worker goes by."""
        return self.engines[0]


class WorkerHost:
    """Builds a worker and runs it on a thread of its own.

    With more than one rank this is the lead, and every other rank has a `FollowerHost` in a process of its own.

    Args:
        config: the worker's.
        connector: new; the host registers the cache with it and closes it.
        emit: takes each step's output, on the worker's thread.
        on_crash: told of an unexpected error in the worker, or of a rank that is gone.
        progress: told of (bytes read, bytes of all weights) while loading.
        capture_progress: told of (CUDA graphs captured, all of them) while a decode worker on a GPU captures its steps.
        channel: to the other ranks; None: there are none.

    Raises:
        CheckpointError: the checkpoint cannot be loaded.
        ConfigError: the configuration does not fit the model or the machine.
        TensorParallelError: a rank does not come.
        ValueError: the channel is for another number of ranks than the configuration.
    """

    def __init__(
        self,
        config: WorkerConfig,
        connector: KVConnector,
        emit: Callable[[StepOutput], None],
        on_crash: Callable[[BaseException], None],
        progress: Progress | None = None,
        capture_progress: Progress | None = None,
        channel: LeadChannel | None = None,
    ) -> None:
        size = 1 if channel is None else len(channel.seats)
        if size != config.tensor_parallel_size:
            raise ValueError(f"{config.name}: seats for {size} ranks, it has {config.tensor_parallel_size}")
        self._connector = connector
        self._channel = channel
        if channel is None:
            built = build_worker(config, connector, load_progress=progress, capture_progress=capture_progress)
            self.info = _info(config, built, (built.engine,))
            self._worker: Alone | Lead = Alone(built.worker)
        else:
            self._connector = connector = AgreedConnector(connector, rank=0)
            seat, clock = channel.seats[0], StepClock()
            built = build_worker(
                config,
                connector,
                group=join_group(0, size, seat.address, config.device, held=channel.held_address),
                clock=clock,
                load_progress=progress,
                capture_progress=capture_progress,
            )
            followers = channel.accept(_FOLLOWERS_TIMEOUT_S)
            self.info = _info(config, built, (built.engine, *(followers[rank] for rank in range(1, size))))
            self._worker = Lead(Replica(built.worker, connector, clock), connector, channel, size, on_crash)
        self._intake = GrammarIntake(built.grammars, self._take)
        self._loop = WorkerLoop(built.engine.engine_id, self._worker, emit, on_crash)
        if isinstance(self._worker, Lead):
            self._worker.listen(self._loop.wake)
        else:
            connector.set_listener(self._loop.wake)
        self._loop.start()

    def submit(self, request: WorkerRequest) -> None:
        """Give the worker a request, once its grammar is compiled if it asks for one."""
        self._intake.submit(request)

    def _take(self, request: WorkerRequest) -> None:
        self._loop.post(lambda worker: worker.take(Submit(request)))

    def abort(self, attempt_id: str, index: int | None = None) -> None:
        """Stop an attempt at a request, or one of its samples."""
        if index is None:
            self._intake.abort(attempt_id)
        self._loop.post(lambda worker: worker.take(Abort(attempt_id, index)))

    def new_endpoint(self, peer: Sequence[EngineInfo], timeout_s: float) -> EngineInfo:
        """Begin to meet a peer, all of whose ranks are given, its lead first; see `KVConnector.new_endpoint`."""
        if isinstance(self._connector, AgreedConnector):
            return self._connector.new_endpoint_for(peer, timeout_s)
        return self._connector.new_endpoint(peer[0], timeout_s)

    def connect(self, peer: Sequence[EngineInfo], timeout_s: float) -> None:
        """Meet a peer, all of whose ranks are given, its lead first; see `KVConnector.connect`."""
        handshake(self._connector, peer, timeout_s)

    def probe(self, engine_id: str, timeout_s: float) -> float:
        """Prove the path to a peer; see `KVConnector.probe`."""
        return self._connector.probe(engine_id, timeout_s)

    def link_to(self, engine_id: str) -> LinkCost | None:
        """What the way to a peer costs; see `KVConnector.link_to`."""
        return self._connector.link_to(engine_id)

    def disconnect(self, engine_id: str, confirmed_dead: bool = False) -> None:
        """A peer is lost; see `KVConnector.disconnect`."""
        self._loop.post(lambda worker: worker.take(Disconnect(engine_id, confirmed_dead)))

    def heartbeat(self) -> Heartbeat:
        """How the worker gets on; asked about once a second, from any one thread."""
        heartbeat = self._loop.heartbeat()
        if isinstance(self._worker, Lead):
            return replace(heartbeat, silent_ranks=self._worker.silent_ranks())
        return heartbeat

    def close(self) -> None:
        """Stop the loop, then the followers, then the connector."""
        self._intake.close()
        self._loop.stop()
        if self._channel is not None:
            self._channel.close()
        self._connector.close()


def handshake(connector: KVConnector, peer: Sequence[EngineInfo], timeout_s: float) -> None:
    """Meet a peer on one rank; see `AgreedConnector.handshake`."""
    if isinstance(connector, AgreedConnector):
        connector.handshake(peer, timeout_s)
    else:
        connector.connect(peer[0], timeout_s)  # a peer of several ranks has another layout, and is refused for it


def _info(config: WorkerConfig, built: BuiltWorker, engines: tuple[EngineInfo, ...]) -> WorkerInfo:
    return WorkerInfo(
        config.name,
        config.role,
        engines,
        built.device_name if len(engines) == 1 else f"{len(engines)} × {built.device_name}",
        built.attention_backend,
        built.max_model_len,
        config.max_num_seqs,
        built.num_blocks,
        built.step_times,
        os.getpid(),
        built.memory,
        config.max_num_batched_tokens,
        built.blocks_per_sequence,
    )
