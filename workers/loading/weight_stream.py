"""Moves tensors from checkpoint files into a model's parameters: several threads, through a little host memory.

Each thread reads pieces of a few MiB into two buffers in turn. On a GPU the buffers are pinned and the copies run on a
stream of the thread's own, so that a buffer is filled while the other is on its way; a dtype is converted on the
device. Beside the model itself nothing larger than the buffers is ever in memory. Of a tensor that is loaded in part no
other part is read: some columns of a matrix are read row by row.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from workers.errors import CheckpointError
from workers.loading.checkpoint import Region, StoredTensor, whole

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Dtypes that weights may be stored in, as safetensors writes them."""

PIECE_BYTES = 8 * 2**20
"""At most so much is read at a time: long enough for the bus, short enough for the threads to end together."""

_GPU_THREADS = 8


@dataclass(frozen=True)
class Placement:
    """A stored tensor, of a dtype in `FLOATS`, and where it goes.

    Attributes:
        stored: the tensor.
        target: contiguous, of the region's shape, or of that shape with more dimensions before it: then it is repeated.
        region: what is read of the tensor, whole but for its first two dimensions; None: all.
    """

    stored: StoredTensor
    target: torch.Tensor
    region: Region | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what is read."""
        return tuple(end - begin for begin, end in self.region or whole(self.stored.shape))

    @property
    def nbytes(self) -> int:
        """How much is read."""
        return math.prod(self.shape) * FLOATS[self.stored.dtype].itemsize


@dataclass(frozen=True)
class _Piece:
    """`num_runs` runs of `run_bytes` bytes in a file, each beginning `stride` bytes after the one before."""

    stored: StoredTensor
    offset: int
    num_runs: int
    run_bytes: int
    stride: int
    target: torch.Tensor
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.num_runs * self.run_bytes


def load_tensors(
    placements: Sequence[Placement],
    device: torch.device,
    on_bytes: Callable[[int], None] | None = None,
    piece_bytes: int = PIECE_BYTES,
    num_threads: int | None = None,
) -> None:
    """Fill every target with what is placed there; when this returns the data is there.

    Args:
        placements: what goes where; all targets on `device`.
        device: the model's.
        on_bytes: told of the bytes of each piece that was read, one call at a time, from several threads.
        piece_bytes: what is read at a time, or a run of columns where that is more; a multiple of 8.
        num_threads: threads that read; None: enough to fill the bus to a GPU from the page cache, one to the CPU, where
            torch copies with threads of its own.

    Raises:
        CheckpointError: a file cannot be read; names file and tensor.
    """
    pieces = deque(piece for placement in placements for piece in _pieces(placement, piece_bytes))
    if not pieces:
        return
    largest = max(piece.nbytes for piece in pieces)
    num_threads = min(len(pieces), num_threads or _num_threads(device))
    lock = threading.Lock()

    def tell(num_bytes: int) -> None:
        if on_bytes is not None:
            with lock:
                on_bytes(num_bytes)

    with contextlib.ExitStack() as stack:
        descriptors = _open_all(stack, placements)
        started_after = torch.cuda.current_stream(device) if device.type == "cuda" else None
        pool = stack.enter_context(ThreadPoolExecutor(num_threads, thread_name_prefix="load"))
        workers = [
            pool.submit(_drain, pieces, descriptors, _Lane(device, largest, started_after), tell)
            for _ in range(num_threads)
        ]
        for worker in workers:
            worker.result()


def _num_threads(device: torch.device) -> int:
    return min(_GPU_THREADS, os.cpu_count() or 1) if device.type == "cuda" else 1


def _pieces(placement: Placement, piece_bytes: int) -> Iterator[_Piece]:
    """What is read of a tensor, cut into elements where all of them follow each other, else into rows.

    What is repeated stays whole.
    """
    if not placement.nbytes:
        return
    stored, target, shape = placement.stored, placement.target, placement.shape
    itemsize, whole_rows = FLOATS[stored.dtype].itemsize, shape[1:] == stored.shape[1:]
    strides = [math.prod(stored.shape[i + 1 :]) * itemsize for i in range(len(shape))]
    begins = (begin for begin, _ in placement.region or whole(stored.shape))
    offset = stored.offset + sum(begin * stride for begin, stride in zip(begins, strides, strict=True))
    unit, stride = (itemsize, itemsize) if whole_rows else (shape[1] * strides[1], strides[0])
    count, repeated = placement.nbytes // unit, target.shape != shape
    step = count if repeated else max(1, piece_bytes // unit)
    for begin in range(0, count, step):
        number = min(step, count - begin)
        num_runs, run_bytes = (1, number * unit) if whole_rows else (number, unit)
        length = unit // itemsize
        part = target if repeated else target.view(-1)[begin * length : (begin + number) * length]
        yield _Piece(stored, offset + begin * stride, num_runs, run_bytes, stride, part, shape)


def _open_all(stack: contextlib.ExitStack, placements: Sequence[Placement]) -> dict[Path, int]:
    """A descriptor for each file, closed with the stack; threads read from it at offsets of their own."""
    descriptors = {}
    for file in dict.fromkeys(placement.stored.file for placement in placements):
        try:
            descriptors[file] = os.open(file, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"{file} cannot be opened: {error.strerror}") from error
        stack.callback(os.close, descriptors[file])
    return descriptors


class _Lane:
    """One thread's way to the device: two host buffers, and on a GPU a stream."""

    def __init__(self, device: torch.device, size: int, started_after: torch.cuda.Stream | None) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if started_after is not None else None
        if (
            self._stream is not None and started_after is not None
        ):  # what had the parameters' memory before them may still be in use
            self._stream.wait_stream(started_after)
        self._buffers = itertools.cycle([_Buffer(size, self._stream) for _ in range(2)])

    def move(self, descriptor: int, piece: _Piece) -> None:
        """Read a piece and send it on its way."""
        buffer = next(self._buffers)
        buffer.wait()
        staged = buffer.memory[: piece.nbytes]
        _read(descriptor, staged, piece)
        source = staged.view(FLOATS[piece.stored.dtype])
        if source.numel() != piece.target.numel():
            source = source.view(piece.shape)
        with torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext():
            if source.dtype != piece.target.dtype or source.numel() != piece.target.numel():
                source = source.to(self._device, non_blocking=True)  # as it is: converted there, not here
            piece.target.copy_(source, non_blocking=True)
            buffer.mark()

    def finish(self) -> None:
        """Wait for what is on its way."""
        if self._stream is not None:
            self._stream.synchronize()


class _Buffer:
    """Host memory that may be written again once the copy from it is over."""

    def __init__(self, size: int, stream: torch.cuda.Stream | None) -> None:
        self.memory = torch.empty(size, dtype=torch.uint8, pin_memory=stream is not None)
        self._stream = stream
        self._copied = torch.cuda.Event() if stream is not None else None

    def wait(self) -> None:
        if self._copied is not None:
            self._copied.synchronize()

    def mark(self) -> None:
        if self._copied is not None:
            self._copied.record(self._stream)


def _drain(pieces: deque[_Piece], descriptors: dict[Path, int], lane: _Lane, tell: Callable[[int], None]) -> None:
    """A thread's work: pieces until there are no more, or until a thread has failed."""
    try:
        with torch.inference_mode():
            while True:
                try:
                    piece = pieces.popleft()
                except IndexError:
                    break
                lane.move(descriptors[piece.stored.file], piece)
                tell(piece.nbytes)
    except BaseException:
        pieces.clear()
        raise
    finally:
        lane.finish()


def _read(descriptor: int, into: torch.Tensor, piece: _Piece) -> None:
    memory, size = memoryview(into.numpy().data), piece.run_bytes
    for run in range(piece.num_runs):
        _read_run(descriptor, memory[run * size : (run + 1) * size], piece.offset + run * piece.stride, piece)


def _read_run(descriptor: int, memory: memoryview, offset: int, piece: _Piece) -> None:
    done = 0
    while done < piece.run_bytes:
        try:
            count = os.preadv(descriptor, [memory[done:]], offset + done)
        except OSError as error:
            raise _unreadable(piece, error.strerror) from error
        if count == 0:
            raise _unreadable(piece, "the file ends before it does")
        done += count


def _unreadable(piece: _Piece, reason: str | None) -> CheckpointError:
    return CheckpointError(f"{piece.stored.file}: tensor {piece.stored.name} cannot be read: {reason}")
