"""A stand-in for vLLM's OpenAI server: the same flags, paths and messages, and no model.

It is as strict as the real one about who may hand what to whom: a `kv_producer` keeps the cache of a prompt only if it
is told to, and a `kv_consumer` takes a prompt only with the parameters that belong to that very prompt.
"""

import argparse
import asyncio
import hashlib
import json
from typing import Any


def cache_id(prompt: list[int]) -> str:
    return hashlib.sha256(json.dumps(prompt).encode()).hexdigest()


class FakeServer:
    """Answers requests; `requests` keeps their bodies."""

    def __init__(self, role: str | None = None, step_s: float = 0.0, break_after: int | None = None) -> None:
        self.requests: list[dict[str, Any]] = []
        self._role = role
        self._step_s = step_s
        self._break_after = break_after

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = next((int(line[15:]) for line in head.split("\r\n") if line.startswith("Content-Length:")), 0)
            body = json.loads(await reader.readexactly(length) or b"{}")
            path = head.split()[1]
            if path == "/health":
                self._plain(writer, 200, {})
            elif path == "/version":
                self._plain(writer, 200, {"version": "fake"})
            else:
                self.requests.append(body)
                await self._complete(writer, body)
            await writer.drain()
        finally:
            writer.close()

    async def _complete(self, writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        params = body.get("kv_transfer_params") or {}
        if self._role == "kv_consumer" and params.get("remote_request_id") != cache_id(body["prompt"]):
            self._plain(writer, 400, {"error": "the parameters do not belong to this prompt"})
        elif body["stream"]:
            await self._stream(writer, body)
        else:
            kept = self._role == "kv_producer" and params.get("do_remote_decode")
            handed = {"do_remote_prefill": True, "remote_request_id": cache_id(body["prompt"])} if kept else None
            choices = [{"index": 0, "text": "w", "finish_reason": "length"}]
            self._plain(writer, 200, {"choices": choices, "kv_transfer_params": handed})

    async def _stream(self, writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        prompt, count = len(body["prompt"]), int(body["max_tokens"])
        for number in range(1, count + 1):
            if self._break_after is not None and number > self._break_after:
                return
            finish = "length" if number == count else None
            choice = {"index": 0, "text": "w", "finish_reason": finish}
            self._event(writer, {"choices": [choice], "usage": _usage(prompt, number)})
            await writer.drain()
            await asyncio.sleep(self._step_s)
        self._event(writer, {"choices": [], "usage": _usage(prompt, count)})
        _chunk(writer, b"data: [DONE]\n\n")
        _chunk(writer, b"")

    def _event(self, writer: asyncio.StreamWriter, message: dict[str, Any]) -> None:
        data = f"data: {json.dumps(message)}\n\n".encode()
        _chunk(writer, data[:7])  # cut anywhere: a message need not come in one piece
        _chunk(writer, data[7:])

    def _plain(self, writer: asyncio.StreamWriter, status: int, answer: dict[str, Any]) -> None:
        data = json.dumps(answer).encode()
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)


def _usage(prompt: int, count: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": count, "total_tokens": prompt + count}


def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")


async def serve(host: str, port: int, role: str | None) -> None:
    server = await asyncio.start_server(FakeServer(role, step_s=0.001).handle, host, port)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for flag in ("--model", "--served-model-name", "--load-format", "--dtype", "--max-model-len", "--max-num-seqs"):
        parser.add_argument(flag, required=True)
    for flag in ("--max-num-batched-tokens", "--block-size", "--gpu-memory-utilization", "--host"):
        parser.add_argument(flag, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--no-enable-prefix-caching", action="store_true")
    parser.add_argument("--disable-uvicorn-access-log", action="store_true")
    parser.add_argument("--kv-cache-memory-bytes", type=int)
    parser.add_argument("--kv-transfer-config", type=json.loads, default={})
    args = parser.parse_args()
    asyncio.run(serve(args.host, args.port, args.kv_transfer_config.get("kv_role")))
