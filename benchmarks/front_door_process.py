"""The server of `benchmarks.front_door`: the real door, engine, queue and router over workers that only say tokens.

Run as a file with PYTHONPATH set to the tree that is measured, so that trees of different commits can be compared; what
it imports is what all of them have. Its decode worker has a token for every stream each step, and makes steps only when
it is told how many. What it says is as cheap as it can be, so that nearly all that is measured is the gateway's.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import sys
import time
from functools import partial
from importlib.metadata import version
from typing import Any

from benchmarks.simulation.hardware import Hardware
from benchmarks.simulation.workers import SimulatedWorker
from cluster.api import ModelInfo
from cluster.config.load import load_config
from cluster.gateway.engine import ServingEngine
from cluster.recall import SHIPPED_MODEL
from cluster.server.grpc.serve import start_server
from cluster.text.tokenizer import Tokenizer
from workers.messages import FinishReason, Load, StepOutput, TokenOutput, WorkerRequest
from workers.runner.step_times import StepTimes

try:
    from cluster.generation.text_generation import Generation
except ImportError:  # a tree that has it beside the engine
    from cluster.gateway.text_generation import Generation  # type: ignore[import-not-found, no-redef]

_PREFILL_WORKERS = 32
"""So that prompts, one at a time on each, are not what streams wait for to begin."""
_SETTLE_S = 0.2
"""After the last step of a slice: for its tokens to be sent."""
_WORDS = "ada bob eva finn alba 4127 9083 , ? "


class SayingWorker(SimulatedWorker):
    """A decode worker whose sequences all have a token each step, and which steps as often as it is told to.

    Attributes:
        num_tokens: that it has said.
    """

    def prepare(self, texts: list[int], step_s: float) -> None:
        """Say these token ids in turn, one each step of so many seconds."""
        self._texts, self._step_s = texts, step_s
        self._left: dict[str, int] = {}
        self._coming: dict[str, list[TokenOutput]] = {}
        self._said: dict[str, list[TokenOutput]] = {}
        self._permits = asyncio.Semaphore(0)
        self._steps_done = asyncio.Event()
        self._steps_left = 0
        self.num_tokens = 0

    async def steps(self, count: int) -> None:
        """Make so many steps."""
        self._steps_left = count
        self._steps_done.clear()
        for _ in range(count):
            self._permits.release()
        await self._steps_done.wait()

    def submit(self, request: WorkerRequest) -> None:
        """See `WorkerHandle.submit`."""
        name, attempt = request.request_id, request.attempt_id
        self._coming[attempt] = [TokenOutput(name, token_id, attempt_id=attempt) for token_id in self._texts]
        self._left[request.attempt_id] = (request.sampling.max_tokens or 1) - 1

    def abort(self, attempt_id: str, index: int | None = None) -> None:
        """See `WorkerHandle.abort`."""
        for each in (self._left, self._coming, self._said):
            each.pop(attempt_id, None)

    def lacks(self, request: WorkerRequest) -> int:
        """All tokens of a prompt are to be moved here."""
        return len(request.prompt_token_ids)

    def receive(self, attempt_id: str) -> None:
        """A sequence's KV cache is whole."""
        if said := self._coming.pop(attempt_id, None):
            self._said[attempt_id] = said

    async def _decode(self) -> None:
        number, load = 0, Load(self.hardware.num_blocks, self.hardware.num_blocks)
        while True:
            await self._permits.acquire()
            await asyncio.sleep(self._step_s)
            number += 1
            events, ended = [], []
            for attempt_id, said in self._said.items():
                left = self._left[attempt_id] = self._left[attempt_id] - 1
                token = said[number % len(said)]
                if left <= 0:
                    ended.append(attempt_id)
                    token = dataclasses.replace(token, finish_reason=FinishReason.LENGTH)
                events.append(token)
            for attempt_id in ended:
                self.abort(attempt_id)
            self.num_tokens += len(events)
            self._out.put_nowait(StepOutput(self.engine_id, tuple(events), load))
            self._steps_left -= 1
            if not self._steps_left:
                self._steps_done.set()


def _pacer(merging: bool) -> dict[str, Any]:
    """Every token is a message, however busy the machine is, unless merging is wanted; older trees have no choice."""
    try:
        from cluster.server.pacing import Pacer
    except ImportError:
        return {}

    class Unhurried(Pacer):
        def sample(self, busy: float) -> None:
            """See `Pacer.sample`."""

    return {} if merging else {"pacer": Unhurried()}


async def serve(streams: int, step_s: float, max_queue: int, merging: bool) -> None:
    """Serve until standard input ends.

    Each line of it is a number of steps to make, and answered with the processor seconds that they took and the tokens
    that they were.
    """
    times = StepTimes(prefill=((1, 1e-4), (1000, 1e-4)), decode=((1, step_s), (streams, step_s)))
    hardware = Hardware(
        times, num_blocks=64 * streams, max_num_seqs=2 * streams, steps_at_once=1, kv_bytes_per_token=1, load_s=0.0
    )
    tokenizer = Tokenizer.load(SHIPPED_MODEL)
    fabric: dict[str, SimulatedWorker] = {}
    decode = SayingWorker("decode-0", "decode", hardware, fabric)
    decode.prepare(list(tokenizer.encode(_WORDS)), step_s)
    prefill = [
        partial(SimulatedWorker, f"prefill-{i}", "prefill", hardware, fabric)  # a place makes its worker
        for i in range(_PREFILL_WORKERS)
    ]
    engine = ServingEngine(prefill, [lambda: decode], max_queue=max_queue)
    await engine.start()
    info = ModelInfo("simulated", "llama", "bfloat16", hardware.max_model_len, 4096, (), False)
    config = load_config(environ={}, overrides={"server.port": 0, "server.default_timeout_s": 3600}).server
    server = await start_server(config, Generation(engine, tokenizer, info), engine, info, **_pacer(merging))
    with contextlib.suppress(ImportError):  # a tree that leaves the collector as Python starts it
        from cluster.server.garbage_collector import settle

        settle()
    print(json.dumps({"address": server.address, "grpcio": version("grpcio")}), flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        began, tokens = time.process_time(), decode.num_tokens
        if steps := int(line):
            await decode.steps(steps)
            await asyncio.sleep(_SETTLE_S)
        spent = time.process_time() - began
        print(json.dumps({"cpu_s": spent, "tokens": decode.num_tokens - tokens}), flush=True)
    await server.stop(grace_s=0)
    await engine.stop()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "merging"))
