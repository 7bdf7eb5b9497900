"""When the service learns that Ray's GCS is gone."""

from __future__ import annotations

import socket

import pytest

from cluster.ray import control_service
from cluster.ray.control_service import listens, until_unreachable


async def test_it_has_to_be_out_of_reach_five_times_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_service, "INTERVAL_S", 0.0)
    looks = [True, *[False] * 4, True, *[False] * 5]
    asked = iter(looks)
    sentence = await until_unreachable("10.0.0.1:6379", lambda address: next(asked))
    assert "10.0.0.1:6379 is out of reach" in sentence
    assert list(asked) == []


def test_whether_somebody_listens() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert not listens(address)
        taken.listen()
        assert listens(address)
