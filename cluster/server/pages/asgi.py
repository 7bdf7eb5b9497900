"""The answers as an ASGI application, which any such server can run or mount."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from cluster.live.answer import MAX_BODY_BYTES, Answer, Responder

_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[_Scope, _Receive, _Send], Awaitable[None]]

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})


def application(answers: Responder, hosts: frozenset[str] | None = None) -> Application:
    """An ASGI application of HTTP.

    Args:
        answers: what it answers.
        hosts: names by which it may be called. One that listens on loopback only must not answer to a name that
            somebody else's page has had a browser look up; None: any.
    """

    async def app(scope: _Scope, receive: _Receive, send: _Send) -> None:
        if scope["type"] != "http":
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        body = await _body(receive)
        if hosts is not None and _host_name(headers.get("host", "")) not in hosts:
            await _send(send, scope, _refusal(421, "this server goes by localhost"))
            return
        if body is None:
            await _send(send, scope, _refusal(413, f"the body has more than {MAX_BODY_BYTES} bytes"))
            return
        await _send(send, scope, await answers.respond(scope["method"], scope["path"], headers, body))

    return app


def _host_name(host: str) -> str:
    """What a Host header says without its port."""
    return host[: host.index("]") + 1] if "]" in host else host.partition(":")[0]


def _refusal(status: int, why: str) -> Answer:
    return Answer(status, f"{why}\n".encode(), {"content-type": "text/plain"})


async def _body(receive: _Receive) -> bytes | None:
    """The request's body; None: it is too large."""
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        part = message.get("body", b"")
        size += len(part)
        if size > MAX_BODY_BYTES:
            return None
        parts.append(part)
        more = message.get("more_body", False)
    return b"".join(parts)


async def _send(send: _Send, scope: _Scope, answer: Answer) -> None:
    headers = {"content-length": str(len(answer.body)), **answer.headers}
    encoded = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": answer.status, "headers": encoded})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else answer.body})
