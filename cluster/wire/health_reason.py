"""Why a health check is answered as it is, in trailing metadata that any gRPC client shows."""

from __future__ import annotations

from collections.abc import Iterable

REASON_KEY = "baton-reason"
"""Why it is not SERVING, or what is impaired though it is; not there: all is well."""


def reason_metadata(reason: str) -> tuple[tuple[str, str], ...]:
    """The entry for a reason, in the characters that a header can carry."""
    text = "".join(c if " " <= c <= "~" else "?" for c in " ".join(reason.split()))
    return ((REASON_KEY, text),) if text else ()


def reason_in(metadata: Iterable[tuple[str, str | bytes]] | None) -> str:
    """The reason that an answer came with; empty: none."""
    return next((str(value) for key, value in metadata or () if key == REASON_KEY), "")
