"""The bearer token that a call carries."""

from __future__ import annotations

from workers.errors import ConfigError

HEADER = "authorization"
_SCHEME = "Bearer "


def bearer(token: str) -> tuple[str, str]:
    """The metadata entry that carries `token`.

    Raises:
        ConfigError: it holds characters that a header cannot carry.
    """
    if not (token.isascii() and token.isprintable()):
        raise ConfigError("the bearer token holds characters that a gRPC header cannot carry: printable ASCII only")
    return (HEADER, _SCHEME + token)
