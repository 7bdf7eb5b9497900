"""Who makes the call that is being answered, as the door has found out; `NOBODY` outside of a call.

Set for a call's task by its door, and for what that starts: what is done for a call knows whose it is.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

from workers.errors import InvalidRequestError

LOWEST_PRIORITY, HIGHEST_PRIORITY = -(2**31), 2**31 - 1
_SEPARATOR = b"\xff"
"""In no text that is UTF-8, so that no client can choose a salt that is another tenant's."""


@dataclass(frozen=True)
class Tenant:
    """On whose account credentials are.

    Attributes:
        name: empty: nobody's in particular; all that say nothing are of this one.
        share: of the service, beside other tenants' who wait.
        priorities: that its requests may have, the first and the last.
    """

    name: str = ""
    share: float = 1.0
    priorities: tuple[int, int] = (LOWEST_PRIORITY, HIGHEST_PRIORITY)

    def check_priority(self, priority: int) -> None:
        """Refuse a priority that it may not use.

        Raises:
            InvalidRequestError: names both.
        """
        first, last = self.priorities
        if not first <= priority <= last:
            raise InvalidRequestError(f"priority is {priority}, with these credentials it must be in [{first}, {last}]")

    def salt(self, given: bytes) -> bytes:
        """The salt of its requests' cached blocks: no other tenant's requests share any, whatever they give."""
        return _SEPARATOR.join((b"", self.name.encode(), given)) if self.name else given


ANYBODY = Tenant()
"""Where there are no credentials, or they name no tenant."""


@dataclass(frozen=True)
class Caller:
    """Who calls.

    Attributes:
        host: where the call comes from, without the port.
        tenant: whose credentials it shows.
    """

    host: str = ""
    tenant: Tenant = ANYBODY

    @property
    def client(self) -> str:
        """Who takes turns with others: a tenant, or where there is none, a host."""
        return f"tenant {self.tenant.name}" if self.tenant.name else self.host

    @property
    def share(self) -> float:
        """Its tenant's."""
        return self.tenant.share


NOBODY = Caller()
_current: ContextVar[Caller] = ContextVar("caller", default=NOBODY)


def accept(caller: Caller) -> None:
    """The call that begins is this caller's."""
    _current.set(caller)


def current_caller() -> Caller:
    """Whose call it is."""
    return _current.get()
