"""A client of OpenAI's completions interface, as vLLM speaks it, that the load generator takes for one of Baton's.

HTTP over asyncio's streams: a connection for each request costs a fraction of a millisecond on the loopback interface.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.api import Usage
from cluster.client.messages import GenerateChunk
from workers.errors import BatonError
from workers.messages import FinishReason
from workers.sampling_params import SamplingParams

_UNKNOWN_TOKEN = -1
_LINE_LIMIT = 8 * 2**20
_PREFILL_ONLY = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
"""`kv_transfer_params` that make vLLM's NixlConnector keep the cache of a prompt until somebody has read it."""


class PeerError(BatonError):
    """The server refused a request, broke off, or did not answer in time."""


@dataclass(frozen=True)
class Endpoint:
    """A server."""

    host: str
    port: int
    model: str


class OpenAIClient:
    """Sends token ids to one server and streams what comes.

    The server says how many tokens a message brings, not which: they are given as -1.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    async def generate(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        sampling: SamplingParams | None = None,
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> AsyncIterator[GenerateChunk]:
        """Generate part by part.

        Raises:
            PeerError: the request failed.
        """
        body = completion_request(self._endpoint.model, token_ids or (), sampling or SamplingParams())
        async with _bounded(self._stream(body, request_id), timeout_s) as chunks:
            async for chunk in chunks:
                yield chunk

    async def _stream(self, body: dict[str, Any], request_id: str) -> AsyncIterator[GenerateChunk]:
        async for chunk in stream_completion(self._endpoint, body, request_id):
            yield chunk


class DisaggregatedClient(OpenAIClient):
    """The proxy of a prefill and a decode server, in the client: no further hop is between it and either of them.

    The prompt goes to the prefill server for one token, with the parameters that make it keep the cache; what it
    answers goes with the same prompt to the decode server, which fetches the cache and streams all tokens.
    """

    def __init__(self, prefill: Endpoint, decode: Endpoint) -> None:
        super().__init__(decode)
        self._prefill = prefill

    async def _stream(self, body: dict[str, Any], request_id: str) -> AsyncIterator[GenerateChunk]:
        first = {**body, "model": self._prefill.model, "stream": False, "max_tokens": 1}
        first.pop("stream_options")
        answer = await post(
            self._prefill, "/v1/completions", {**first, "kv_transfer_params": _PREFILL_ONLY}, request_id
        )
        params = answer.get("kv_transfer_params")
        if not params:
            raise PeerError("the prefill server answered without kv_transfer_params: it keeps no cache for others")
        async for chunk in stream_completion(self._endpoint, {**body, "kv_transfer_params": params}, request_id):
            yield chunk


def completion_request(model: str, token_ids: Sequence[int], sampling: SamplingParams) -> dict[str, Any]:
    """The body of a streamed completion that counts its tokens as they come."""
    return {
        "model": model,
        "prompt": list(token_ids),
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "ignore_eos": sampling.ignore_eos,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }


async def stream_completion(
    endpoint: Endpoint, body: Mapping[str, Any], request_id: str
) -> AsyncIterator[GenerateChunk]:
    """A streamed completion, message by message; the last one has the usage.

    Raises:
        PeerError: the request failed.
    """
    seen = 0
    async with _exchange(endpoint, "POST", "/v1/completions", body, request_id) as lines:
        async for line in lines:
            if not line.startswith(b"data: ") or line == b"data: [DONE]":
                continue
            message = json.loads(line[6:])
            if "error" in message:
                raise PeerError(f"the server broke off: {message['error']}")
            count = int((message.get("usage") or {}).get("completion_tokens", seen))
            choice = message["choices"][0] if message["choices"] else {}
            reason = choice.get("finish_reason")
            yield GenerateChunk(
                request_id=request_id,
                text=choice.get("text") or "",
                token_ids=(_UNKNOWN_TOKEN,) * (count - seen),
                logprobs=(),
                finish_reason=FinishReason(reason) if reason else None,
                usage=None if message["choices"] else Usage(int(message["usage"]["prompt_tokens"]), count),
                report=None,
            )
            seen = count


async def post(endpoint: Endpoint, path: str, body: Mapping[str, Any], request_id: str = "") -> dict[str, Any]:
    """Send JSON, get JSON.

    Raises:
        PeerError: the request failed.
    """
    async with _exchange(endpoint, "POST", path, body, request_id) as lines:
        answer: dict[str, Any] = json.loads(b"\n".join([line async for line in lines]))
        return answer


@contextlib.asynccontextmanager
async def _bounded(
    stream: AsyncIterator[GenerateChunk], timeout_s: float | None
) -> AsyncIterator[AsyncIterator[GenerateChunk]]:
    """A stream that is closed at the end, and its failures as `PeerError`s."""
    try:
        async with asyncio.timeout(timeout_s):
            yield stream
    except TimeoutError as error:
        raise PeerError(f"no end after {timeout_s:g} s") from error
    except (OSError, asyncio.IncompleteReadError) as error:
        raise PeerError(f"the connection broke: {error}") from error
    finally:
        await stream.aclose()  # type: ignore[attr-defined]


@contextlib.asynccontextmanager
async def _exchange(
    endpoint: Endpoint, method: str, path: str, body: Mapping[str, Any] | None, request_id: str
) -> AsyncIterator[AsyncIterator[bytes]]:
    """Send a request; the lines of the answer's body.

    Raises:
        PeerError: the status is not 200.
    """
    content = b"" if body is None else json.dumps(body).encode()
    head = [f"{method} {path} HTTP/1.1", f"Host: {endpoint.host}:{endpoint.port}", "Connection: close"]
    head += ["Content-Type: application/json", f"Content-Length: {len(content)}"]
    head += [f"X-Request-Id: {request_id}"] if request_id else []
    reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port, limit=_LINE_LIMIT)
    try:
        writer.write("\r\n".join([*head, "", ""]).encode() + content)
        status, headers = await _read_head(reader)
        parts = _chunks(reader) if headers.get("transfer-encoding") == "chunked" else _plain(reader, headers)
        if status != 200:
            text = b"".join([part async for part in parts]).decode(errors="replace")
            raise PeerError(f"{method} {path} was answered with {status}: {text[:500]}")
        yield _lines(parts)
    finally:
        writer.close()


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {}
    for line in head[1:]:
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip().lower()
    return int(head[0].split()[1]), headers


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The body in HTTP's chunked transfer coding (RFC 9112, 7.1)."""
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)


async def _plain(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> AsyncIterator[bytes]:
    length = headers.get("content-length")
    yield await (reader.read() if length is None else reader.readexactly(int(length)))


async def _lines(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The lines of a body, each as soon as it is complete, empty ones left out."""
    rest = b""
    async for part in parts:
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if stripped := line.strip():
                yield stripped
    if stripped := rest.strip():
        yield stripped
