"""What a worker that does not start is said to wait for."""

from __future__ import annotations

import asyncio

import pytest

from cluster.ray import waiting
from cluster.ray.placement_group import RankResources
from cluster.ray.waiting import awaited, tell_if_it_takes_long

DECODE = RankResources(num_cpus=2.0, num_gpus=0.0, custom={"decode": 1.0})


def test_what_is_missing_is_named_with_what_is_free() -> None:
    assert awaited(DECODE, 2, {"CPU": 3.0}) == (
        "room in the Ray cluster: it asks for 4 CPU, 2 decode, and 3 CPU, 0 decode are free"
    )
    assert awaited(DECODE, 1, {"CPU": 8.0, "decode": 1.0}).startswith("a process, or room on one node")


async def test_it_is_said_once_and_not_where_it_went_quickly(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    quick = asyncio.create_task(tell_if_it_takes_long("decode-0", lambda: "room"))
    await asyncio.sleep(0)
    quick.cancel()
    monkeypatch.setattr(waiting, "PATIENCE_S", 0.0)
    await tell_if_it_takes_long("decode-1", lambda: "room")
    assert [record.getMessage() for record in caplog.records] == ["decode-1 waits for room"]
