"""When the service learns that something of Ray is gone."""

from __future__ import annotations

import socket

import pytest

from cluster.ray import control_service
from cluster.ray.control_service import listens, until_lost


async def test_the_same_has_to_be_missing_five_times_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_service, "INTERVAL_S", 0.0)
    asked = iter(["", *["the GCS is gone"] * 4, "", *["the GCS is gone"] * 3, *["the node is gone"] * 5])
    assert await until_lost(lambda: next(asked)) == "the node is gone: no worker can be replaced, so the service ends"
    assert list(asked) == []


def test_whether_somebody_listens() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert not listens(address)
        taken.listen()
        assert listens(address)
