"""Who makes the call that is being answered, as the door has found out; `nobody` outside of a call.

Set for a call's task by its door, and for what that starts: what is done for a call knows whose it is.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class Caller:
    """Who calls.

    Attributes:
        host: where the call comes from, without the port.
    """

    host: str = ""

    @property
    def client(self) -> str:
        """Who takes turns with others."""
        return self.host


NOBODY = Caller()
_current: ContextVar[Caller] = ContextVar("caller", default=NOBODY)


def accept(caller: Caller) -> None:
    """The call that begins is this caller's."""
    _current.set(caller)


def current_caller() -> Caller:
    """Whose call it is."""
    return _current.get()
