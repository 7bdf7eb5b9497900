"""The bearer token that a call carries, and what it is good for."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from cluster.caller import ANYBODY, HIGHEST_PRIORITY, LOWEST_PRIORITY, Tenant
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
MIN_SHARE, MAX_SHARE = 0.001, 1000.0


@dataclass(frozen=True)
class Credential:
    """A token, its roles, and on whose account it is.

    Raises:
        ConfigError: the token holds characters that a header cannot carry.
    """

    token: str
    roles: frozenset[Role] = ALL_ROLES
    tenant: Tenant = ANYBODY

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
    Between roles and token may stand `tenant=NAME`, `share=NUMBER` and `priority=FIRST:LAST`, see `Tenant`. A token
    that may only generate and says nothing of priorities may use those from 0 on.

    Raises:
        ConfigError: there is no token, an unknown role or setting, or a token that a header cannot carry.
    """
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        *before, token = words
        roles = _roles(before.pop(0), number) if before and "=" not in before[0] else ALL_ROLES
        if any("=" not in word for word in before):
            raise ConfigError(f"line {number} has {len(words)} words; a token comes alone or behind its roles")
        found.append(Credential(token, roles, _tenant(before, roles, number)))
    if not found:
        raise ConfigError("there is no token in it")
    return tuple(found)


def _roles(text: str, number: int) -> frozenset[Role]:
    names = text.split(",")
    if unknown := [name for name in names if name not in list(Role)]:
        known = " and ".join(Role)
        raise ConfigError(f"line {number} has the role {unknown[0]!r}; the roles are {known}")
    return frozenset(map(Role, names))


def _tenant(settings: Sequence[str], roles: frozenset[Role], number: int) -> Tenant:
    values = dict[str, str](setting.partition("=")[::2] for setting in settings)
    if unknown := [name for name in values if name not in ("tenant", "share", "priority")]:
        raise ConfigError(f"line {number} has the setting {unknown[0]!r}; there are tenant, share and priority")
    first = LOWEST_PRIORITY if Role.OPERATE in roles else 0
    try:
        priorities = (first, HIGHEST_PRIORITY)
        if "priority" in values:
            low, _, high = values["priority"].partition(":")
            priorities = (int(low), int(high or low))
        share = float(values.get("share", "1"))
    except ValueError as error:
        raise ConfigError(
            f"line {number}: share is a number, and priority the first and the last, as 0:10: {error}"
        ) from error
    if not LOWEST_PRIORITY <= priorities[0] <= priorities[1] <= HIGHEST_PRIORITY:
        raise ConfigError(
            f"line {number} has the priorities {priorities[0]} to {priorities[1]}; they are in "
            f"[{LOWEST_PRIORITY}, {HIGHEST_PRIORITY}], the first one first"
        )
    if not MIN_SHARE <= share <= MAX_SHARE:
        raise ConfigError(f"line {number} has the share {share:g}, it must be in [{MIN_SHARE:g}, {MAX_SHARE:g}]")
    return Tenant(values.get("tenant", ""), share, priorities)


def authorize(given: Sequence[str], role: Role | None, credentials: Sequence[Credential]) -> Tenant:
    """Whose call it is; one that none of the credentials allows is refused.

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
    allowed = [credential for credential in matches if role is None or role in credential.roles]
    if not allowed:
        raise ForbiddenError(f"the token is not good for this: it needs the role {role}")
    return allowed[0].tenant
