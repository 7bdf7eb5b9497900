"""Who gets workers now, who waits, who is turned away."""

from __future__ import annotations

import asyncio
import heapq
import math
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from cluster.errors import QueueFullError
from cluster.gateway.fairness import TokenCounters

T = TypeVar("T")

_REMEMBERED_ADMISSIONS = 64
_ENOUGH_ADMISSIONS = 8
_SHORTEST_RETRY_S, _LONGEST_RETRY_S = 0.1, 60.0


_BEFORE_ALL = -(2**31) - 1
"""More urgent than any priority that a client can ask for."""


@dataclass(frozen=True)
class Ticket:
    """Whose turn it is, and what it costs.

    Attributes:
        priority: lower ones go first, whatever the others have waited.
        user: those of one priority and tenant take turns by the tokens that each was served.
        prompt_tokens: of the request.
        readmitted: it has been let in before and starts again: it goes before all others, and is never turned away.
        tenant: those of one priority take turns by the tokens that each was served, divided by its share.
        share: the tenant's.
    """

    priority: int = 0
    user: str = ""
    prompt_tokens: int = 0
    readmitted: bool = False
    tenant: str = ""
    share: float = 1.0

    def __post_init__(self) -> None:
        if self.readmitted:
            object.__setattr__(self, "priority", _BEFORE_ALL)


_ANYBODY = Ticket()
_Key = tuple[int, str, str]
"""Priority, tenant and user."""


@dataclass(eq=False)
class _Waiter:
    ticket: Ticket
    number: int
    turn: asyncio.Event = field(default_factory=asyncio.Event)
    turned_away: QueueFullError | None = None

    @property
    def key(self) -> _Key:
        return self.ticket.priority, self.ticket.tenant, self.ticket.user


@dataclass
class _TenantsPart:
    """What a tenant has of the queue."""

    waiting: int = 0
    share: float = 1.0

    @property
    def load(self) -> float:
        return self.waiting / self.share


class AdmissionQueue(Generic[T]):
    """A bounded queue in front of something that may or may not have room.

    The next one is of the most urgent priority; among those, of the tenant with the fewest tokens served for its share,
    and of its user with the fewest; among those, the first to come. What is taken is taken by who waited for it, in one
    go with its return: nobody can be cancelled between getting room and knowing of it, so that no room is lost.

    Past saturation somebody has to be refused. Without `max_wait_s` the queue grows until everybody waits just short of
    the deadline, all of them late, and the service computes answers that come too late to be of use. With it, who would
    be late is refused before anything was computed for it, so that what is computed is in time, and goodput stays what
    it is at saturation however many requests come. It bounds the wait and not the time to the first token: that a
    service is crowded is its own affair, that a prompt is long is not, and long ones are served when it is quiet and
    when it is crowded.

    Args:
        max_waiting: requests that may wait. When all do, one of a tenant that has fewer than others for its share takes
            the place of the last one of who has most; else a more urgent one that of the least urgent of its tenant.
        clock: monotonic seconds.
        max_wait_s: the longest that a request may wait here. One that would wait longer, by the pace of the last
            admissions, is refused at once; one that has waited so long is refused then.
    """

    def __init__(
        self, max_waiting: int, clock: Callable[[], float] = time.monotonic, max_wait_s: float = math.inf
    ) -> None:
        self._max_waiting = max_waiting
        self._max_wait_s = max_wait_s
        self._clock = clock
        self._counters = TokenCounters()
        self._lines: dict[_Key, OrderedDict[_Waiter, None]] = {}
        self._order: list[
            tuple[int, tuple[float, float], int, _Key]
        ] = []  # with the counters then, and the first's number
        self._in_order: set[_Key] = set()
        self._by_tenant: dict[str, _TenantsPart] = {}
        self._num_joined = 0
        self._num_waiting = 0
        self._admissions: deque[float] = deque(maxlen=_REMEMBERED_ADMISSIONS)
        self._crowded_s = 0.0
        self._crowded_since = 0.0

    def __len__(self) -> int:
        return self._num_waiting

    async def admit(
        self,
        attempt: Callable[[], T | None],
        ticket: Ticket = _ANYBODY,
        patience_s: float = math.inf,
        on_wait: Callable[[], None] = lambda: None,
    ) -> T:
        """Wait until `attempt` succeeds.

        Args:
            attempt: takes what it needs and returns it, or None when there is no room now; what it raises ends the
                wait. Called after each change of circumstances, for whoever is at the head of the queue.
            ticket: the place in the queue.
            patience_s: seconds that are left until waiting is in vain.
            on_wait: called when there is no room at once, and waiting begins.

        Raises:
            QueueFullError: there is no room, and every place in the queue is taken or the wait would be too long.
        """
        if not self._num_waiting and (result := attempt()) is not None:
            self._begin(ticket)
            return result
        if not ticket.readmitted:
            self._make_place(ticket, patience_s)
        waiter = self._join(ticket)
        on_wait()
        alarm = None if ticket.readmitted else self._set_alarm(waiter)
        try:
            while True:
                await waiter.turn.wait()
                waiter.turn.clear()
                if waiter.turned_away is not None:
                    raise waiter.turned_away
                if (result := attempt()) is not None:
                    self._begin(ticket)
                    self._admissions.append(self._crowded_time())
                    return result
        finally:
            if alarm is not None:
                alarm.cancel()
            self._leave(waiter)
            self.retry()  # there may be room for the next one too

    def retry(self) -> None:
        """Circumstances have changed: let whoever is at the head of the queue try again."""
        if (head := self._head()) is not None:
            head.turn.set()

    def charge(self, user: str, output_tokens: int, tenant: str = "", share: float = 1.0) -> None:
        """So many tokens were generated for a user of a tenant with this share."""
        self._counters.charge(tenant, share, user, output_tokens)

    def _begin(self, ticket: Ticket) -> None:
        self._counters.begin(ticket.tenant, ticket.share, ticket.user, ticket.prompt_tokens)

    def expected_wait_s(self, ticket: Ticket) -> float:
        """About how long a newcomer would wait, at the pace of the last admissions; 0 where there is none yet.

        Only time in which somebody waited counts: after a quiet hour the pace is not one of a request an hour.
        """
        if len(self._admissions) < _ENOUGH_ADMISSIONS:
            return 0.0
        span = self._crowded_time() - self._admissions[0]
        return self._num_ahead(ticket) * span / len(self._admissions)

    def _crowded_time(self) -> float:
        """Seconds during which somebody waited, so far."""
        return self._crowded_s + (self._clock() - self._crowded_since if self._num_waiting else 0.0)

    def _num_ahead(self, ticket: Ticket) -> int:
        """Waiters that would go first, if tenants and users of its priority take turns."""
        ahead = sum(len(line) for (priority, _, _), line in self._lines.items() if priority < ticket.priority)
        own = len(self._lines.get((ticket.priority, ticket.tenant, ticket.user), ()))
        of_own_tenant, of_others = 0, Counter[str]()
        for (priority, tenant, _), line in self._lines.items():
            if priority == ticket.priority and tenant == ticket.tenant:
                of_own_tenant += min(len(line), own + 1)
            elif priority == ticket.priority:
                of_others[tenant] += len(line)
        return ahead + of_own_tenant + sum(min(waiting, of_own_tenant + 1) for waiting in of_others.values())

    def _make_place(self, ticket: Ticket, patience_s: float) -> None:
        """See that a newcomer may wait.

        Raises:
            QueueFullError: it may not.
        """
        wait_s = self.expected_wait_s(ticket)
        if wait_s > max(patience_s, 0.0):
            raise QueueFullError(
                f"the service is at capacity: about {wait_s:.3g} s to wait, and {patience_s:.3g} s to the deadline",
                retry_after_s=self._retry_after_s(wait_s),
            )
        if wait_s > self._max_wait_s:
            raise QueueFullError(
                f"the service is at capacity: about {wait_s:.3g} s to wait, and {self._max_wait_s:.3g} s is the most",
                retry_after_s=self._retry_after_s(wait_s - self._max_wait_s),
            )
        if self._num_waiting < self._max_waiting:
            return
        full = QueueFullError(
            f"the service is at capacity and {self._max_waiting} requests are waiting already",
            retry_after_s=self._retry_after_s(wait_s),
        )
        if (waiter := self._least(ticket)) is None:
            raise full
        waiter.turned_away = full
        waiter.turn.set()
        self._leave(waiter)

    def _least(self, ticket: Ticket) -> _Waiter | None:
        """Whose place a newcomer takes where there is none: the last one of a longest line; None: nobody's."""
        tenant, most = max(self._by_tenant.items(), key=lambda item: item[1].load, default=(ticket.tenant, None))
        own = self._by_tenant.get(ticket.tenant)
        load = ((0 if own is None else own.waiting) + 1) / ticket.share
        crowded = most is not None and tenant != ticket.tenant and most.load > load
        of_tenant = tenant if crowded else ticket.tenant
        lines = {key: line for key, line in self._lines.items() if key[1] == of_tenant and key[0] != _BEFORE_ALL}
        least_urgent = max((priority for priority, _, _ in lines), default=ticket.priority)
        if not lines or (least_urgent <= ticket.priority and not crowded):
            return None
        longest = max((len(line), key) for key, line in lines.items() if key[0] == least_urgent)
        return next(reversed(lines[longest[1]]))

    def _set_alarm(self, waiter: _Waiter) -> asyncio.TimerHandle | None:
        """See that nobody waits longer than is allowed."""
        if math.isinf(self._max_wait_s):
            return None
        return asyncio.get_running_loop().call_later(self._max_wait_s, self._turn_away_late, waiter)

    def _turn_away_late(self, waiter: _Waiter) -> None:
        waiter.turned_away = waiter.turned_away or QueueFullError(
            f"the service is at capacity: there was no room within {self._max_wait_s:.3g} s",
            retry_after_s=self._retry_after_s(self.expected_wait_s(waiter.ticket)),
        )
        waiter.turn.set()
        self._leave(waiter)

    def _retry_after_s(self, wait_s: float) -> float:
        return min(max(wait_s, _SHORTEST_RETRY_S), _LONGEST_RETRY_S)

    def _join(self, ticket: Ticket) -> _Waiter:
        if not self._num_waiting:
            self._crowded_since = self._clock()
        self._num_joined += 1
        self._num_waiting += 1
        waiter = _Waiter(ticket, self._num_joined)
        key = waiter.key
        self._lines.setdefault(key, OrderedDict())[waiter] = None
        part = self._by_tenant.setdefault(ticket.tenant, _TenantsPart())
        part.waiting, part.share = part.waiting + 1, ticket.share
        if key not in self._in_order:
            self._push(key)
        return waiter

    def _leave(self, waiter: _Waiter) -> None:
        key = waiter.key
        line = self._lines.get(key)
        if line is None or waiter not in line:
            return
        del line[waiter]
        self._crowded_s = self._crowded_time()
        self._crowded_since = self._clock()
        self._num_waiting -= 1
        part = self._by_tenant[waiter.ticket.tenant]
        part.waiting -= 1
        if not part.waiting:
            del self._by_tenant[waiter.ticket.tenant]
        if not line:
            del self._lines[key]

    def _push(self, key: _Key) -> None:
        priority, tenant, user = key
        self._in_order.add(key)
        first = next(iter(self._lines[key]))
        heapq.heappush(self._order, (priority, self._counters.of(tenant, user), first.number, key))

    def _head(self) -> _Waiter | None:
        """The next one. Counters only grow, so that an entry whose counter is out of date is never too far back."""
        while self._order:
            _, counters, _, key = self._order[0]
            _, tenant, user = key
            line = self._lines.get(key)
            if line is not None and self._counters.of(tenant, user) == counters:
                return next(iter(line))
            heapq.heappop(self._order)
            self._in_order.remove(key)
            if line is not None:
                self._push(key)
        return None
