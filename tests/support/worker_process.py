"""A whole worker in a process of its own, over real NIXL, driven through a pipe: the gateway's part is the test's.

Run as a script it is the worker's side; imported, `WorkerProcess` is the test's.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

_KEY = b"worker-process"
_ROOT = Path(__file__).parents[2]


class WorkerProcess:
    """The test's end.

    Args:
        config: fields of a `WorkerConfig`.

    Attributes:
        outputs: the `StepOutput`s that the worker has sent, oldest first; take them out.
        info: its `WorkerInfo`, once it is ready.
    """

    def __init__(self, **config: Any) -> None:
        self.outputs: deque[Any] = deque()
        self.info: Any = None
        listener = Listener(("127.0.0.1", 0), authkey=_KEY)
        host, port = listener.address
        path = [str(_ROOT), str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            "UCX_NET_DEVICES": "lo",
            "NIXL_LOG_LEVEL": "WARN",
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path),
        }
        self.process = subprocess.Popen([sys.executable, str(Path(__file__)), host, str(port)], env=environment)
        listener._listener._socket.settimeout(60)  # type: ignore[attr-defined]  # it offers no other way
        self.pipe: Connection = listener.accept()
        listener.close()
        self.pipe.send(config)

    def wait_ready(self, timeout_s: float = 120.0) -> None:
        """Until the worker is built."""
        self.info = self._answer("the start", timeout_s)

    def call(self, method: str, *args: Any, timeout_s: float = 60.0) -> Any:
        """Call a method of `Served` there."""
        self.pipe.send((method, args, True))
        return self._answer(method, timeout_s)

    def post(self, method: str, *args: Any) -> None:
        """The same without an answer; what goes wrong fails the next `receive`."""
        self.pipe.send((method, args, False))

    def receive(self) -> None:
        """Take what has arrived into `outputs`."""
        while self.pipe.poll():
            self._take(self.pipe.recv())

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.process.kill()
        self.process.wait(10)

    def _answer(self, to: str, timeout_s: float) -> Any:
        while True:
            assert self.pipe.poll(timeout_s), f"{to} took longer than {timeout_s} s"
            kind, value = self.pipe.recv()
            if kind == "answer":
                return value
            self._take((kind, value))

    def _take(self, message: tuple[str, Any]) -> None:
        kind, value = message
        assert kind == "output", f"{kind}: {value}"
        self.outputs.append(value)


class Served:
    """The worker's end: what can be called."""

    def __init__(self, config: dict[str, Any], say: Callable[[str, Any], None]) -> None:
        from kv_transfer.nixl_connector import NixlConnector
        from workers.config import WorkerConfig
        from workers.worker_host import WorkerHost

        self._host = WorkerHost(
            WorkerConfig(**config),
            NixlConnector(drain_s=0.2),
            lambda output: say("output", output),
            lambda error: say("crashed", repr(error)),
        )
        self.info = self._host.info

    def connect(self, peer: Sequence[Any]) -> None:
        """Meet a peer, given its engines."""
        self._host.connect(peer, 30.0)

    def probe(self, engine_id: str) -> float:
        """Prove the path to it."""
        return self._host.probe(engine_id, 30.0)

    def submit(self, requests: Sequence[Any]) -> None:
        """Give the worker requests."""
        for request in requests:
            self._host.submit(request)

    def abort(self, request_ids: Sequence[str]) -> None:
        """Stop some."""
        for request_id in request_ids:
            self._host.abort(request_id)

    def gpu_memory(self) -> dict[str, int]:
        """Bytes: what torch holds in this process, now and at most."""
        import torch

        return {"reserved": torch.cuda.memory_reserved(), "most_reserved": torch.cuda.max_memory_reserved()}

    def close(self) -> None:
        """Stop the worker."""
        self._host.close()


def main() -> None:
    """Serve a worker until the pipe is closed."""
    with Client((sys.argv[1], int(sys.argv[2])), authkey=_KEY) as pipe:
        lock = threading.Lock()

        def say(kind: str, value: Any) -> None:
            with lock:
                pipe.send((kind, value))

        try:
            served = Served(pipe.recv(), say)
        except BaseException as error:
            say("did not start", repr(error))
            raise
        say("answer", served.info)
        while True:
            try:
                method, args, wants_answer = pipe.recv()
            except EOFError:
                break
            try:
                value = getattr(served, method)(*args)
            except Exception as error:
                say(f"{method} failed", repr(error))
                continue
            if wants_answer:
                say("answer", value)


if __name__ == "__main__":
    main()
