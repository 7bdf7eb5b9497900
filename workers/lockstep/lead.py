"""Keeps the ranks of a worker equal: each runs the whole worker, and all of them are given the same, step by step.

A worker's step is a pure function of what it is given: commands, the events of its connector, and the time. The lead
(rank 0) decides on these, sends them to the followers, and takes the step itself; what a step schedules, allocates,
pushes and samples is then the same on all ranks without another word (a replicated state machine; Schneider, 1990,
"Implementing fault-tolerant services using the state machine approach"). Every input carries a digest of what came out
of the step before, so that ranks which are not equal are noticed at the next step.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from kv_transfer.connector import ConnectorEvent
from workers.commands import Command
from workers.lockstep.agreement import Agreement, GroupEvent
from workers.lockstep.channel import FollowerChannel, LeadChannel
from workers.lockstep.connector import AgreedConnector
from workers.lockstep.pulse import PULSE_S, Pulse, Pulses
from workers.lockstep.replica import Crashed, Replica, StepInput
from workers.messages import CacheUpdate, DecodeReport, Load, PrefillReport, WorkerEvent
from workers.parallel.errors import TensorParallelError

logger = logging.getLogger(__name__)


class Lead:
    """The worker as the lead's loop drives it: a step here is a step on every rank.

    Args:
        replica: the lead's own.
        connector: the lead's.
        channel: to the followers, who have all come.
        size: ranks.
        on_crash: told of a follower's end, from any thread: the lead itself may then wait for it in a collective.
    """

    def __init__(
        self,
        replica: Replica,
        connector: AgreedConnector,
        channel: LeadChannel,
        size: int,
        on_crash: Callable[[BaseException], None],
    ) -> None:
        self._replica = replica
        self._connector = connector
        self._channel = channel
        self._wake: Callable[[], None] = lambda: None
        self._on_crash = on_crash
        self._commands: list[Command] = []
        self._lock = threading.Lock()
        self._agreement = Agreement(size)
        self._pulses = Pulses(size)
        self._agreed: list[GroupEvent] = []
        self._crash: TensorParallelError | None = None

    def listen(self, wake: Callable[[], None]) -> None:
        """Take the ranks' reports from now on, and call `wake`, from any thread, when a step has something to do."""
        self._wake = wake
        self._connector.set_listener(lambda: self._on_report(0, self._connector.take_own()))
        self._channel.listen(self._on_report, lambda rank: self._on_lost(f"rank {rank} is gone"))

    def take(self, command: Command) -> None:
        """Have a command carried out by every rank, before the next step."""
        self._commands.append(command)

    @property
    def has_work(self) -> bool:
        """Whether a step has something to do at once."""
        return bool(self._agreed) or bool(self._commands) or self._replica.worker.has_work or self._crash is not None

    @property
    def broken_peers(self) -> Mapping[str, str]:
        """Engine ids to which the connection of some rank is broken."""
        return {**self._pulses.broken_peers, **self._replica.worker.broken_peers}

    @property
    def load(self) -> Load:
        """The load now."""
        return self._replica.worker.load

    @property
    def num_to_agree(self) -> int:
        """What some ranks have reported, and not all."""
        return self._agreement.num_open

    def silent_ranks(self) -> tuple[int, ...]:
        """Followers of which nothing has been heard for long. To be asked every `PULSE_S`, which it counts."""
        return self._pulses.next_round()

    def step(self) -> list[WorkerEvent]:
        """Take a step on every rank.

        Raises:
            TensorParallelError: a follower is gone.
        """
        if self._crash is not None:
            raise self._crash
        with self._lock:
            agreed, self._agreed = tuple(self._agreed), []
        commands, self._commands = tuple(self._commands), []
        now = time.monotonic()
        given = StepInput(self._replica.number, now, agreed, commands, self._replica.digest)
        self._channel.send(given)
        events = self._replica.run(given)
        return _at_the_end(events, time.monotonic() - now)

    def take_cache_update(self) -> CacheUpdate | None:
        """How the prefix cache has changed with the last step, on every rank; None: not at all."""
        return self._replica.cache_update

    def _on_report(self, rank: int, report: Sequence[ConnectorEvent] | Pulse | Crashed) -> None:
        if isinstance(report, Pulse):
            self._pulses.hear(rank, report)
            return
        if isinstance(report, Crashed):
            self._on_lost(f"rank {rank} crashed: {report.reason}")
            return
        try:
            with self._lock:
                agreed = self._agreement.report(rank, report)
                self._agreed += agreed
        except TensorParallelError as error:
            self._on_lost(str(error))
            return
        if agreed:
            self._wake()

    def _on_lost(self, reason: str) -> None:
        with self._lock:
            if self._crash is not None:
                return
            self._crash = TensorParallelError(reason)
        self._on_crash(self._crash)
        self._wake()


class Follower:
    """Runs a follower's steps on a thread of its own, as the lead says, and is heard by another one.

    Args:
        replica: the follower's own.
        connector: the follower's.
        channel: to the lead.
        on_end: called once the steps have ended, with what ended them; None: the lead did, in good order.
    """

    def __init__(
        self,
        replica: Replica,
        connector: AgreedConnector,
        channel: FollowerChannel,
        on_end: Callable[[BaseException | None], None],
    ) -> None:
        self._replica = replica
        self._connector = connector
        self._channel = channel
        self._on_end = on_end
        self._reporting = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="follower", daemon=True)
        self._pulse = threading.Thread(target=self._beat, name="follower-pulse", daemon=True)
        connector.set_listener(self._on_events)

    def start(self) -> None:
        """Start the threads."""
        self._thread.start()
        self._pulse.start()

    def join(self, timeout_s: float) -> None:
        """Wait for the end."""
        self._thread.join(timeout_s)

    def _run(self) -> None:
        ended_by: BaseException | None = None
        try:
            while (given := self._channel.receive()) is not None:
                self._replica.run(given)
        except EOFError as error:
            ended_by = error
        except BaseException as error:
            logger.exception("a rank stops after an unexpected error")
            self._report(Crashed(f"{type(error).__name__}: {error}"))
            ended_by = error
        self._ended.set()
        self._channel.close()
        self._on_end(ended_by)

    def _beat(self) -> None:
        """Be heard until the end, also while a step waits in a collective."""
        while not self._ended.wait(PULSE_S):
            self._report(Pulse(self._connector.broken_peers))

    def _on_events(self) -> None:
        if broken := self._connector.broken_peers:  # the lead is to know before what failed for it is tried again
            self._report(Pulse(broken))
        self._report(self._connector.take_own())

    def _report(self, report: Sequence[ConnectorEvent] | Pulse | Crashed) -> None:
        with self._reporting:
            self._channel.report(report)


def _at_the_end(events: list[WorkerEvent], elapsed_s: float) -> list[WorkerEvent]:
    """What happened in a step happened at its end, while the worker's clock stood still at its start."""
    corrected: list[WorkerEvent] = []
    for event in events:
        if isinstance(event, PrefillReport):
            event = replace(event, prefill_s=event.prefill_s + elapsed_s)
        elif isinstance(event, DecodeReport):
            event = replace(event, first_decode_s=event.first_decode_s + elapsed_s)
        corrected.append(event)
    return corrected
