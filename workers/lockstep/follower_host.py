"""A rank of a worker that follows: put together like the lead's, and stepped as the lead says."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from kv_transfer.connector import KVConnector
from kv_transfer.link_cost import LinkCost
from kv_transfer.transports.base import EngineInfo
from workers.builder import build_worker
from workers.config import WorkerConfig
from workers.lockstep.channel import FollowerChannel, Seat
from workers.lockstep.connector import AgreedConnector
from workers.lockstep.lead import Follower
from workers.lockstep.replica import Replica, StepClock
from workers.parallel.group import join_group

_JOIN_TIMEOUT_S = 5.0


class FollowerHost:
    """Builds a rank's copy of a worker, tells the lead, and runs it on a thread of its own.

    Args:
        config: the worker's, the same for all ranks.
        seat: the rank's.
        connector: new; the host registers the rank's cache with it and closes it.
        on_end: called once, when the rank's steps have ended or the lead is gone: with what ended them, or None when
            the lead said so. With an error the process is of no more use: its steps may wait for ever in a collective.

    Raises:
        CheckpointError: the checkpoint cannot be loaded.
        ConfigError: the configuration does not fit the model or the machine.
        TensorParallelError: a rank does not come.
    """

    def __init__(
        self,
        config: WorkerConfig,
        seat: Seat,
        connector: KVConnector,
        on_end: Callable[[BaseException | None], None],
    ) -> None:
        self._on_end = on_end
        self._ending = threading.Lock()
        self._connector = AgreedConnector(connector, seat.rank)
        clock = StepClock()
        group = join_group(seat.rank, seat.size, seat.address, config.device)
        built = build_worker(config, self._connector, group=group, clock=clock)
        self._channel = FollowerChannel(seat, built.engine, lambda: self._end(EOFError("the lead is gone")))
        replica = Replica(built.worker, self._connector, clock)
        self._follower = Follower(replica, self._connector, self._channel, self._end)
        self._follower.start()

    def new_endpoint(self, peer: Sequence[EngineInfo], timeout_s: float) -> EngineInfo:
        """Begin to meet the same rank of a peer; see `AgreedConnector.new_endpoint_for`."""
        return self._connector.new_endpoint_for(peer, timeout_s)

    def connect(self, peer: Sequence[EngineInfo], timeout_s: float) -> None:
        """Meet the same rank of a peer; see `AgreedConnector.handshake`."""
        self._connector.handshake(peer, timeout_s)

    def probe(self, engine_id: str, timeout_s: float) -> float:
        """Prove the path to the same rank of a peer; see `KVConnector.probe`."""
        return self._connector.probe(engine_id, timeout_s)

    def link_to(self, engine_id: str) -> LinkCost | None:
        """What the way to the same rank of a peer costs; see `KVConnector.link_to`."""
        return self._connector.link_to(engine_id)

    def close(self) -> None:
        """End the steps, then the connector; after the lead has closed, if it can."""
        self._follower.join(_JOIN_TIMEOUT_S)
        self._channel.close()
        self._connector.close()

    def _end(self, error: BaseException | None) -> None:
        """The thread that steps and the one that watches the lead may both find out; the first one counts."""
        if self._ending.acquire(blocking=False):
            self._on_end(error)
