"""A peer in a process of its own, driven over a pipe; forked from one that has imported what takes long to import."""

from __future__ import annotations

import os
import runpy
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

import pytest
import torch

from forked import FORKED

os.environ.setdefault("UCX_NET_DEVICES", "lo")
os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")

_SCRIPT = Path(__file__).with_name("nixl_peer.py")


class Peer:
    """A `NixlConnector` in another process; `peer.method(...)` calls it there."""

    def __init__(self, name: str, device: str = "cpu", environment: dict[str, str] | None = None) -> None:
        listener = Listener(("127.0.0.1", 0), authkey=b"nixl-peer")
        host, port = listener.address
        arguments = {"ARGUMENTS": (name, device, host, port, environment or {})}
        self.process = FORKED.Process(target=runpy.run_path, args=(str(_SCRIPT), arguments, "__main__"), daemon=True)
        self.process.start()
        listener._listener._socket.settimeout(60)  # type: ignore[attr-defined]  # it offers no other way
        self._pipe: Connection = listener.accept()
        listener.close()

    def __getattr__(self, method: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self._pipe.send((method, args))
            assert self._pipe.poll(30), f"{method} did not return"
            ok, value = self._pipe.recv()
            if not ok:
                raise value
            return value

        return call

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.process.kill()
        self.process.join(10)


_NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, _NO_GPU])])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def make_peer(device: str) -> Iterator[Callable[..., Peer]]:
    peers: list[Peer] = []

    def make(name: str, environment: dict[str, str] | None = None) -> Peer:
        peers.append(Peer(name, device, environment))
        return peers[-1]

    yield make
    for peer in peers:
        peer.kill()
