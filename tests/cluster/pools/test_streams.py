"""What workers say reaches the engine, and the end of a stream is told, whoever looks after the worker."""

from __future__ import annotations

import asyncio

import pytest

from cluster.errors import WorkerLostError
from cluster.pools.replica import Replica
from cluster.pools.streams import OutputStreams
from workers.heartbeat import Heartbeat
from workers.messages import Load, StepOutput


class Handle:
    """A worker that says what it is given."""

    name, role = "decode-0", "decode"

    def __init__(self) -> None:
        self.said: asyncio.Queue = asyncio.Queue()

    async def outputs(self):
        while not isinstance(item := await self.said.get(), Exception):
            yield item
        raise item


def output(free: int) -> StepOutput:
    return StepOutput("decode-0", (), Load(10, free))


@pytest.fixture
def replica() -> Replica:
    return Replica(Handle, Handle())


async def test_outputs_are_handed_on_in_order_and_heartbeats_are_heard(replica):
    taken: list[StepOutput] = []
    stream = OutputStreams(taken.append).open(replica)
    outputs = [output(free) for free in (9, 8, 7)]
    for item in (outputs[:2], [Heartbeat(5, 0.25)], outputs[2:]):
        replica.handle.said.put_nowait(item)
    replica.handle.said.put_nowait(WorkerLostError("gone"))
    with pytest.raises(WorkerLostError, match="gone"):
        await stream.ended
    assert taken == outputs
    assert stream.num_heard == 3
    assert replica.load == outputs[-1].load
    assert replica.heartbeat == Heartbeat(5, 0.25)


async def test_a_stream_that_is_closed_is_not_listened_to_any_more(replica):
    taken: list[StepOutput] = []
    stream = OutputStreams(taken.append).open(replica)
    await asyncio.sleep(0)
    stream.ended.cancel()
    replica.handle.said.put_nowait([output(9)])
    with pytest.raises(asyncio.CancelledError):
        await stream.ended
    assert taken == []
