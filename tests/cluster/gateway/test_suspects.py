"""A request that crashes workers costs two of them, however often it is sent, and nobody else's answer."""

from __future__ import annotations

import asyncio
from typing import ClassVar

import pytest

from cluster.errors import CrashingRequestError
from cluster.gateway.suspects import MOST_SETTLE_S, REMEMBERED_S, SETTLE_S, Suspects, key_of
from cluster.inprocess_worker import InProcessWorker
from fleet import Fleet, prompt
from made_requests import engine_request
from workers.sampling_params import SamplingParams

POISON = prompt(33, seed=666)


class Poisoned(InProcessWorker):
    """Crashes a moment after it was sent the poison, with everything that it has."""

    crashes = 0

    def submit(self, request):
        super().submit(request)
        if request.prompt_token_ids[: len(POISON)].tolist() == POISON:
            type(self).crashes += 1
            asyncio.get_running_loop().call_later(0.01, self.crash, "poisoned by the test")


class PoisonedDecode(Poisoned):
    """Only decode workers do."""

    def submit(self, request):
        if self.role == "decode":
            super().submit(request)
        else:
            InProcessWorker.submit(self, request)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("cluster.gateway.suspects.SETTLE_S", 0.01)
    monkeypatch.setattr(Poisoned, "crashes", 0)
    monkeypatch.setattr(PoisonedDecode, "crashes", 0)


async def crashes_and_answers(fleet: Fleet, retries: int) -> list[object]:
    """What becomes of some long requests, beside the poison that a client sends again and again."""
    others = [asyncio.ensure_future(fleet.run(prompt(40, seed=i), 40)) for i in range(6)]
    await asyncio.sleep(0.05)
    for _ in range(retries):
        with pytest.raises(CrashingRequestError, match=r"two workers|another worker was before"):
            await fleet.run(POISON, 30)
    return await asyncio.gather(*others, return_exceptions=True)


@pytest.mark.parametrize("shape", [(1, 1), (2, 2)])
@pytest.mark.parametrize("worker_class", [Poisoned, PoisonedDecode])
async def test_a_poisoned_request_ends_two_workers_and_nobody_elses_answer(worker_class, shape, make_fleet, expected):
    fleet = await make_fleet(*shape, worker_class=worker_class)
    answers = await crashes_and_answers(fleet, retries=4)
    assert answers == [expected(prompt(40, seed=i), 40) for i in range(6)]
    assert worker_class.crashes <= 2 * (2 if worker_class is Poisoned else 1), "of each attempt's two workers at most"
    await fleet.until_idle()


async def test_crashes_for_other_reasons_leave_no_suspicion(make_fleet, expected):
    fleet = await make_fleet(1, 2)
    for turn in range(3):
        running = [asyncio.ensure_future(fleet.run(prompt(40, seed=i), 30)) for i in range(4)]
        await asyncio.sleep(0.05)
        fleet.handle(f"decode-{turn % 2}").crash("killed by the test")
        assert await asyncio.gather(*running) == [expected(prompt(40, seed=i), 30) for i in range(4)]
        await fleet.until_idle()


async def test_what_many_ask_is_not_convicted_by_a_crash_that_it_did_not_cause(make_fleet, expected):
    """Nor by the loss of a second worker while it is suspected."""
    fleet = await make_fleet(1, 2)
    running = [asyncio.ensure_future(fleet.run(prompt(40), 30)) for _ in range(6)]
    await asyncio.sleep(0.05)
    fleet.handle("decode-0").crash("killed by the test")
    fleet.handle("decode-1").crash("killed by the test")
    assert await asyncio.gather(*running) == [expected(prompt(40), 30)] * 6
    await fleet.until_idle()


class NoticedLate(InProcessWorker):
    """Dead from when its name is among the dead, as a process is of which its machine has not told yet.

    None starts in place of another meanwhile.
    """

    dead: ClassVar[set[str]] = set()

    async def start(self, progress):
        while self.dead:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        return await super().start(progress)

    async def outputs(self):
        async for batch in super().outputs():
            if self.name not in self.dead:
                yield batch


async def test_a_worker_that_was_lost_with_the_first_and_noticed_later_convicts_nobody(make_fleet, expected):
    fleet = await make_fleet(1, 2, worker_class=NoticedLate)
    running = [asyncio.ensure_future(fleet.run(prompt(40, seed=i), 30)) for i in range(4)]
    await asyncio.sleep(0.05)
    NoticedLate.dead = {"decode-1"}
    fleet.handle("decode-0").crash("killed by the test")
    await asyncio.sleep(0.4)
    NoticedLate.dead = set()
    fleet.handle("decode-1").crash("killed by the test at the same time")
    assert await asyncio.gather(*running) == [expected(prompt(40, seed=i), 30) for i in range(4)]
    await fleet.until_idle()


def request(text: int = 1, **sampling):
    return engine_request("r", prompt(20, seed=text), SamplingParams(**{"max_tokens": 4, "seed": 1, **sampling}))


async def test_turns_are_taken_by_suspects_alone_and_one_by_one():
    clock = [0.0]
    suspects = Suspects(lambda: clock[0])
    assert await suspects.turn(request()) is None
    suspects.crashed(request(1), in_its_turn=False)
    suspects.crashed(request(2), in_its_turn=False)
    assert await suspects.turn(request(3)) is None, "it was not there"
    clock[0] = SETTLE_S + 1
    first = await suspects.turn(request(1, seed=5))
    assert first is not None, "the same with another seed"
    second = asyncio.ensure_future(suspects.turn(request(2)))
    await asyncio.sleep(0)
    assert not second.done()
    first.end()
    first.end()
    assert await second is not None
    suspects.cleared(request(2))
    assert await suspects.turn(request(2)) is None


async def test_a_turn_waits_until_every_worker_has_been_heard(monkeypatch):
    monkeypatch.setattr("cluster.gateway.suspects.LOOK_S", 0.0)
    clock, heard = [0.0], [False]
    suspects = Suspects(lambda: clock[0], lambda: lambda: heard[0])
    for ends_by in ("hearing", "patience"):
        suspects.crashed(request(), in_its_turn=False)
        clock[0] += SETTLE_S
        turn = asyncio.ensure_future(suspects.turn(request()))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not turn.done()
        if ends_by == "hearing":
            heard[0] = True
        else:
            clock[0] += MOST_SETTLE_S
        (await turn).end()
        heard[0] = False


async def test_the_second_crash_is_its_own_and_is_remembered_for_a_while():
    clock = [0.0]
    suspects = Suspects(lambda: clock[0])
    suspects.check(request())
    for _ in range(2):  # of two like it that were on the same worker
        suspects.crashed(request(), in_its_turn=False)
        suspects.check(request())
    suspects.crashed(request(), in_its_turn=True)
    with pytest.raises(CrashingRequestError, match="not tried again for 10 minutes"):
        suspects.check(request(seed=77))
    suspects.check(request(2))
    suspects.check(request(temperature=0.5))
    clock[0] = REMEMBERED_S + 1
    suspects.check(request())
    for text in range(3000):
        suspects.crashed(request(text), in_its_turn=False)
    assert len(suspects) == 1024
    assert key_of(request(1)) != key_of(request(2))
