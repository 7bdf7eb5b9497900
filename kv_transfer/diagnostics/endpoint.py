"""One of the two processes of a path check: registers memory as a worker does, then measures, or answers."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kv_transfer.diagnostics.report import EndReport, Measured
from kv_transfer.layout import GroupLayout, KVLayout
from kv_transfer.transports.base import EngineInfo

if TYPE_CHECKING:
    from kv_transfer.transports.nixl import NixlTransport

LAYOUT = KVLayout((GroupLayout("full", (0,), 16, 8, 128, "bfloat16"),))
"""One layer of 64 KiB blocks."""

_GROUP = LAYOUT.primary

_COPIES = 5


@dataclass(frozen=True)
class EndConfig:
    """What one process is told.

    Attributes:
        name: of its engine.
        device: "cpu" or "cuda"; it uses the first card that it sees.
        num_blocks: of `LAYOUT` that it registers.
        environment: variables to set before UCX and CUDA are loaded.
    """

    name: str
    device: str
    num_blocks: int
    environment: Mapping[str, str]


def run_end(pipe: Connection, config: EndConfig) -> None:
    """Do what the pipe says until it is closed: (method, arguments) comes, (True, result) or (False, text) goes."""
    os.dup2(2, 1)  # what libraries print is not the command's output
    os.environ.update(config.environment)
    end = PathEnd(config, pipe)
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        while True:
            method, arguments = pipe.recv()
            try:
                answer: tuple[bool, Any] = (True, getattr(end, method)(*arguments))
            except Exception as error:
                answer = (False, f"{type(error).__name__}: {error}")
            pipe.send(answer)


class PathEnd:
    """What a process can be told to do.

    Args:
        config: how it is set up.
        pipe: that interrupts `serve`.
    """

    def __init__(self, config: EndConfig, pipe: Connection) -> None:
        self._config = config
        self._pipe = pipe

    def start(self) -> EngineInfo:
        """Allocate the memory, register it, and say how it is reached."""
        from kv_transfer.transports.nixl import NixlTransport  # UCX reads its environment when it is loaded

        self._cache = torch.zeros(
            (1, self._config.num_blocks, *_GROUP.block_shape), dtype=torch.bfloat16, device=self._config.device
        )
        self._transport: NixlTransport = NixlTransport(count_descriptors=True)
        engine_id = f"{self._config.name}.{secrets.randbits(64):016x}"
        return self._transport.register(engine_id, secrets.randbits(64), [self._cache], LAYOUT)

    def describe(self) -> EndReport:
        """What is true of this process, now that its agent is there."""
        on_gpu = self._config.device == "cuda"
        return EndReport(
            self._config.device,
            torch.cuda.get_device_name() if on_gpu else "",
            f"GPU-{torch.cuda.get_device_properties(0).uuid}" if on_gpu else "",
            _has_cuda_context() if on_gpu else None,
            _ucx_modules(),
            _copy_bytes_per_s(self._cache),
        )

    def connect(self, peer: EngineInfo) -> None:
        """Add the peer."""
        self._transport.add_peer(peer)

    def fill(self, seed: int) -> int:
        """Fill the memory with noise; returns its checksum."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randint(0, 256, (_GROUP.block_bytes,), dtype=torch.uint8, generator=generator)
        data = self._bytes()
        data.copy_(noise.expand(data.shape[0], -1))
        data[:, 0] = torch.arange(data.shape[0]).to(torch.uint8)
        return self.checksum()

    def checksum(self) -> int:
        """CRC-32 of the memory."""
        return zlib.crc32(self._bytes().cpu().numpy().data)

    def measure(self, peer: str) -> Measured:
        """Measure the path to a peer that is serving."""
        from kv_transfer.diagnostics.measure import measure_path

        return measure_path(self._transport, peer, self._config.num_blocks, _GROUP.block_bytes)

    def serve(self) -> None:
        """Answer pings until something comes through the pipe."""
        from kv_transfer.diagnostics.measure import PING

        while not self._pipe.poll(0):
            for sender, message in self._transport.receive():
                if message == PING:
                    self._transport.send(sender, message)

    def _bytes(self) -> torch.Tensor:
        """The memory as (num_blocks, block_bytes) bytes."""
        return self._cache.view(torch.uint8).view(self._config.num_blocks, _GROUP.block_bytes)


def _has_cuda_context() -> bool:
    """Whether this thread has a CUDA context, which UCX asks for when it chooses a transport."""
    context = ctypes.c_void_p()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return driver.cuCtxGetCurrent(ctypes.byref(context)) == 0 and context.value is not None


def _ucx_modules() -> tuple[str, ...]:
    """The transport modules of UCX that this process has loaded."""
    prefix = "libuct_"
    names = (Path(line.split()[-1]).name for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line)
    return tuple(sorted({name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)}))


def _copy_bytes_per_s(cache: torch.Tensor) -> float:
    """How fast one half of the memory is copied to the other, without any network: best of a few."""
    middle = cache.shape[1] // 2
    source, target = cache[:, :middle], cache[:, middle : 2 * middle]
    best = float("inf")
    for _ in range(_COPIES):
        started = time.monotonic()
        target.copy_(source)
        if cache.is_cuda:
            torch.cuda.current_stream().synchronize()
        best = min(best, time.monotonic() - started)
    return source.nbytes / best
