"""The bearer token that a call carries, and what it is good for."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from cluster.errors import AuthenticationError, ForbiddenError
from workers.errors import ConfigError

HEADER = "authorization"
_SCHEME = "Bearer "


class Role(StrEnum):
    """What the bearer of a token may do."""

    GENERATE = "generate"
    """Send prompts."""
    OPERATE = "operate"
    """See the workers and where requests would go, and change how many there are."""


ALL_ROLES = frozenset(Role)


@dataclass(frozen=True)
class Credential:
    """A token and its roles.

    Raises:
        ConfigError: the token holds characters that a header cannot carry.
    """

    token: str
    roles: frozenset[Role] = ALL_ROLES

    def __post_init__(self) -> None:
        bearer(self.token)


def bearer(token: str) -> tuple[str, str]:
    """The metadata entry that carries `token`.

    Raises:
        ConfigError: it holds characters that a header cannot carry.
    """
    if not (token.isascii() and token.isprintable()):
        raise ConfigError("the bearer token holds characters that a gRPC header cannot carry: printable ASCII only")
    return (HEADER, _SCHEME + token)


def parse_credentials(text: str) -> tuple[Credential, ...]:
    """The content of a file of tokens: one a line, behind its roles or alone, which is good for everything.

    For example `generate 8f3a…`, `operate 51bc…`, `generate,operate 77d0…`. Empty lines and those that begin with #
    count for nothing. Two tokens of the same roles are both good, for the time in which one replaces the other.

    Raises:
        ConfigError: there is no token, an unknown role, or a token that a header cannot carry.
    """
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) > 2:
            raise ConfigError(f"line {number} has {len(words)} words; a token comes alone or behind its roles")
        roles = ALL_ROLES if len(words) == 1 else _roles(words[0], number)
        found.append(Credential(words[-1], roles))
    if not found:
        raise ConfigError("there is no token in it")
    return tuple(found)


def _roles(text: str, number: int) -> frozenset[Role]:
    names = text.split(",")
    if unknown := [name for name in names if name not in list(Role)]:
        known = " and ".join(Role)
        raise ConfigError(f"line {number} has the role {unknown[0]!r}; the roles are {known}")
    return frozenset(map(Role, names))


def authorize(given: Sequence[str], role: Role | None, credentials: Sequence[Credential]) -> None:
    """Refuse a call that none of the credentials allows.

    Args:
        given: the values of the call's `authorization` headers.
        role: that the call needs; None: any token will do.
        credentials: the good ones.

    Raises:
        AuthenticationError: there is no token, or a wrong one.
        ForbiddenError: the token is good for other calls.
    """
    if not given:
        raise AuthenticationError("the call carries no bearer token")
    # Every one is compared, in constant time, so that the time of a refusal says nothing about a token.
    matches = [c for c in credentials if hmac.compare_digest(given[0].encode(), (_SCHEME + c.token).encode())]
    if len(given) > 1 or not matches:
        raise AuthenticationError("wrong bearer token")
    if role is not None and not any(role in credential.roles for credential in matches):
        raise ForbiddenError(f"the token is not good for this: it needs the role {role}")
