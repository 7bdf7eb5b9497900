"""A request for which there is no room any more goes on elsewhere; a worker whose step hangs gets none."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from cluster.inprocess_worker import InProcessWorker
from fleet import prompt, tokens_of
from workers.decode_worker import DecodeWorker
from workers.errors import RoomLostError
from workers.heartbeat import Heartbeat
from workers.messages import RequestFailed, StepOutput, TokenOutput, WorkerEvent


class Crowded(InProcessWorker):
    """A decode worker that loses its room when a request has three tokens there, as often as the test says."""

    times = 0

    async def outputs(self) -> AsyncIterator[list[StepOutput | Heartbeat]]:
        tokens: dict[str, int] = {}
        async for batch in super().outputs():
            yield batch
            for output in batch:
                for event in getattr(output, "events", ()):
                    if self.role == "decode" and isinstance(event, TokenOutput) and Crowded.times:
                        tokens[event.attempt_id] = tokens.get(event.attempt_id, 0) + 1
                        if tokens[event.attempt_id] == 3:
                            Crowded.times -= 1
                            yield [self._failure(output, event)]

    def _failure(self, output: StepOutput, event: TokenOutput) -> StepOutput:
        failed = RequestFailed(event.request_id, RoomLostError("no room any more"), attempt_id=event.attempt_id)
        return StepOutput(output.engine_id, (failed,), output.load)


@pytest.mark.parametrize("times", [1, 2])
async def test_it_goes_on_where_there_is_room_without_a_seam(times, make_fleet, expected):
    fleet = await make_fleet(1, 2, worker_class=Crowded)
    Crowded.times = times
    stream = fleet.start(prompt(40), 24)
    assert [token async for token in tokens_of(stream)] == expected(prompt(40), 24)
    assert (await stream.report()).attempts == 1 + times
    await fleet.until_idle()


async def test_it_ends_in_a_typed_error_where_there_is_none_anywhere(make_fleet):
    fleet = await make_fleet(1, 2, worker_class=Crowded)
    Crowded.times = 3
    with pytest.raises(RoomLostError, match="no room any more"):
        await fleet.run(prompt(40), 24)
    await fleet.until_idle()


@pytest.mark.usefixtures("like_workers")
async def test_a_worker_whose_step_hangs_looks_idle_and_gets_no_requests_and_is_replaced(
    make_fleet, expected, monkeypatch
):
    fleet = await make_fleet(1, 2, silence_s=3.0, patience={"step_timeout_s": 5.0})
    before = {worker.engine_id for worker in fleet.engine.workers() if worker.role == "decode"}
    goes_on, hanging = threading.Event(), []
    step = DecodeWorker.step

    def hang(worker: DecodeWorker) -> list[WorkerEvent]:
        if not hanging:
            hanging.append(worker)
        if worker in hanging:
            goes_on.wait(60.0)
        return step(worker)

    monkeypatch.setattr(DecodeWorker, "step", hang)
    await fleet.until(lambda workers: any(worker.state == "stalled" for worker in workers))
    (stalled,) = [worker for worker in fleet.engine.workers() if worker.state == "stalled"]
    assert (stalled.load.running, stalled.load.waiting) == (0, 0)
    for i in range(4):
        stream = fleet.start(prompt(30, seed=i), 6)
        assert [token async for token in tokens_of(stream)] == expected(prompt(30, seed=i), 6)
        assert (await stream.report()).decode_worker != stalled.engine_id
    await fleet.until(lambda workers: stalled.engine_id not in [w.engine_id for w in workers if w.state == "stalled"])
    goes_on.set()
    await fleet.until(lambda workers: {w.state for w in workers} == {"ready"})
    after = {worker.engine_id for worker in fleet.engine.workers() if worker.role == "decode"}
    assert before - after == {stalled.engine_id}
    answers = await asyncio.gather(*(fleet.run(prompt(30, seed=i), 6) for i in range(4)))
    assert answers == [expected(prompt(30, seed=i), 6) for i in range(4)]
