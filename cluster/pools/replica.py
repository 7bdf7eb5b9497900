"""Who is in the pools."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from cluster.api import WorkerStatus
from cluster.config.group_key import group_key
from cluster.worker_handle import WorkerHandle
from kv_transfer.link_cost import LinkCost
from workers.heartbeat import Heartbeat
from workers.messages import Load
from workers.runner.step_times import StepTimes
from workers.worker_host import WorkerInfo

_HOPELESS_AFTER_RESTARTS = 6


@dataclass(frozen=True)
class Loss:
    """A worker that is lost.

    Attributes:
        engine_id: its own.
        crashed: whether its process ended or its step hangs, which a request can do; one that fell silent may be frozen
            or cut off, which no request does.
    """

    engine_id: str
    crashed: bool


OnState = Callable[[str, str, str], None]
"""Takes a worker's engine id, its role and its new state."""

Spawn = Callable[[], WorkerHandle]
"""Makes a new worker for a place in a pool."""


@dataclass(eq=False)
class Replica:
    """One place in a pool, and whoever holds it.

    Attributes:
        spawn: makes a new worker for this place.
        handle: the worker.
        group: name of the group that the place belongs to; empty in a pool that names none.
        info: what it said of itself; None until it has loaded.
        predecessor: what the last one that held this place said of itself; the next will be its like.
        load: last reported.
        heartbeat: the last one; None: there was none.
        listening: the task that hears what its worker says, from when that has loaded until it is lost.
        unsupported_reasons: engine ids of the other pool whose KV cache is laid out differently, and how.
        unreachable_peers: engine ids of the other pool that it cannot reach at present, and why.
        peer_endpoints: where it reaches each peer of the other pool, by engine id, since they met last.
        links: of a prefill worker: what the link to each decode worker costs that it has met, by engine id.
        restarts: workers that this place has lost in a row.
        ready_since: monotonic time.
        num_heard: times that something was heard of its worker, heartbeats too, since it started.
        heard_at: when the last of them was, monotonic time; 0: never.
        absent_since: when it had its last worker that served, monotonic time, or was made.
        life: the task that looks after it: notices that its worker is lost, and replaces it.
        on_state: told when its state changes.
    """

    spawn: Spawn
    handle: WorkerHandle
    group: str = ""
    info: WorkerInfo | None = None
    predecessor: WorkerInfo | None = None
    load: Load = field(default_factory=lambda: Load(0, 0))
    heartbeat: Heartbeat | None = None
    listening: asyncio.Task[None] | None = None
    unsupported_reasons: dict[str, str] = field(default_factory=dict)
    unreachable_peers: dict[str, str] = field(default_factory=dict)
    peer_endpoints: dict[str, str] = field(default_factory=dict)
    links: dict[str, LinkCost] = field(default_factory=dict)
    restarts: int = 0
    ready_since: float = 0.0
    num_heard: int = 0
    heard_at: float = 0.0
    absent_since: float = field(default_factory=time.monotonic)
    life: asyncio.Task[None] | None = None
    on_state: OnState = lambda engine_id, role, state: None
    _state: str = "starting"

    @property
    def state(self) -> str:
        """Starting, ready, stalled (nothing new while a step takes far too long), draining (it finishes what it has and
        gets nothing new) or lost."""
        return self._state

    @state.setter
    def state(self, state: str) -> None:
        if state != self._state:
            if self.serves:
                self.absent_since = time.monotonic()
            self._state = state
            self.on_state(self.engine_id, self.handle.role, state)

    @property
    def group_key(self) -> str:
        """Of its group."""
        return group_key(self.handle.role, self.group)

    @property
    def serves(self) -> bool:
        """Whether requests may be on it."""
        return self.state in ("ready", "stalled", "draining")

    @property
    def may_return(self) -> bool:
        """Whether it is ready, or likely to be soon."""
        return self.state in ("ready", "stalled") or (
            self.state != "draining" and self.restarts < _HOPELESS_AFTER_RESTARTS
        )

    @property
    def engine_id(self) -> str:
        """Of the worker that holds this place; its name until it is ready."""
        return self.info.engine.engine_id if self.info is not None else self.handle.name

    @property
    def block_size(self) -> int:
        """Tokens in a block of its KV cache; 0 until it has loaded."""
        return self.info.engine.layout.primary.block_size if self.info is not None else 0

    def renew(self) -> None:
        """Have a new worker for this place, which has yet to start."""
        self.handle = self.spawn()
        self.predecessor = self.info or self.predecessor
        self.info, self.state, self.num_heard, self.heard_at, self.heartbeat = None, "starting", 0, 0.0, None

    @property
    def foreseeable(self) -> WorkerInfo | None:
        """What its worker has said of itself, or is likely to say soon; None: there is no knowing."""
        return self.info or (self.predecessor if self.may_return else None)

    def status(self) -> WorkerStatus:
        """As clients see it."""
        info = self.info
        return WorkerStatus(
            engine_id=self.engine_id,
            role=self.handle.role,
            state=self.state,
            device=info.device if info else "",
            attention_backend=info.attention_backend if info else "",
            block_size=self.block_size,
            load=self.load,
            group=self.group,
            max_num_seqs=info.max_num_seqs if info else 0,
            step_times=info.step_times if info else StepTimes(),
        )


class Roster:
    """All members, each pool in the order in which they came, prefill first.

    Args:
        on_state: told of one whose state has changed.
    """

    def __init__(self, on_state: OnState = lambda engine_id, role, state: None) -> None:
        self._on_state = on_state
        self._pools: dict[str, list[Replica]] = {"prefill": [], "decode": []}
        self._serving: dict[str, Replica] = {}

    def __iter__(self) -> Iterator[Replica]:
        for pool in self._pools.values():
            yield from pool

    def pool(self, role: str) -> list[Replica]:
        """The members of one pool."""
        return list(self._pools[role])

    def find(self, engine_id: str) -> Replica | None:
        """The member that holds this engine now."""
        replica = self._serving.get(engine_id)
        return replica if replica is not None and replica.engine_id == engine_id else None

    def peers(self, replica: Replica) -> list[Replica]:
        """Those of the other pool that requests may be on."""
        return [peer for peer in self if peer.serves and peer.handle.role != replica.handle.role]

    def add(self, replica: Replica) -> None:
        """Somebody comes."""
        replica.on_state = self._on_state
        self._on_state(replica.engine_id, replica.handle.role, replica.state)
        self._pools[replica.handle.role].append(replica)

    def remove(self, replica: Replica) -> None:
        """Somebody goes."""
        self._pools[replica.handle.role].remove(replica)
        self.forget(replica.engine_id)

    def know(self, replica: Replica) -> None:
        """A member's worker has said who it is."""
        self._serving[replica.engine_id] = replica

    def forget(self, engine_id: str) -> None:
        """This engine is no more."""
        self._serving.pop(engine_id, None)
