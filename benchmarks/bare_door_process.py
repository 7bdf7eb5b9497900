"""A bare gRPC server for `benchmarks.front_door`: what a message costs that is there already, with no Baton behind it.

A task a stream waits for the next step and writes the same prepared bytes, as gRPC's documentation has it. It is driven
as `benchmarks.front_door_process` is.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from importlib.metadata import version

import grpc

from protos import baton_pb2

_SETTLE_S = 0.2


class Streams:
    """All streams of the server, and the steps that give each of them a message."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._waiting: list[asyncio.Future[None]] = []
        self.num_messages = 0

    async def steps(self, count: int) -> None:
        """Make so many steps."""
        for _ in range(count):
            await asyncio.sleep(self._step_s)
            waiting, self._waiting = self._waiting, []
            for future in waiting:
                if not future.done():
                    future.set_result(None)

    async def generate(self, raw: bytes, context: grpc.aio.ServicerContext) -> None:
        """Answer a call: the first message at once, and one each step."""
        request = baton_pb2.GenerateRequest.FromString(raw)
        message = baton_pb2.GenerateResponse(request_id="x" * 32, text="ada ", token_ids=[7]).SerializeToString()
        last = baton_pb2.GenerateResponse(
            token_ids=[7], finish_reason=baton_pb2.FINISH_REASON_LENGTH, usage=baton_pb2.Usage(completion_tokens=1)
        )
        loop = asyncio.get_running_loop()
        for _ in range(request.sampling.max_tokens - 1):
            await context.write(message)
            future = loop.create_future()
            self._waiting.append(future)
            await future
            self.num_messages += 1
        await context.write(last.SerializeToString())


async def serve(step_s: float) -> None:
    """Serve until standard input ends; see `front_door_process.serve`."""
    streams = Streams(step_s)
    service = baton_pb2.DESCRIPTOR.services_by_name["Baton"].full_name
    handlers = {"Generate": grpc.unary_stream_rpc_method_handler(streams.generate)}
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    print(json.dumps({"address": f"127.0.0.1:{port}", "grpcio": version("grpcio")}), flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        began, messages = time.process_time(), streams.num_messages
        if steps := int(line):
            await streams.steps(steps)
            await asyncio.sleep(_SETTLE_S)
        spent = time.process_time() - began
        print(json.dumps({"cpu_s": spent, "tokens": streams.num_messages - messages}), flush=True)
    await server.stop(None)


if __name__ == "__main__":
    asyncio.run(serve(float(sys.argv[2])))
