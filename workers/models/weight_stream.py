"""Moves tensors from checkpoint files into a model's parameters: several threads, through a little host memory.

Each thread reads pieces of a few MiB into two buffers in turn. On a GPU the buffers are pinned and the copies run on a
stream of the thread's own, so that a buffer is filled while the other is on its way; a dtype is converted on the
device. Beside the model itself nothing larger than the buffers is ever in memory.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from workers.errors import CheckpointError
from workers.models.checkpoint import StoredTensor

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
        target: contiguous, of its shape, or of that shape with more dimensions before it: then it is repeated.
    """

    stored: StoredTensor
    target: torch.Tensor


@dataclass(frozen=True)
class _Piece:
    stored: StoredTensor
    offset: int
    nbytes: int
    target: torch.Tensor


def load_tensors(
    placements: Sequence[Placement],
    device: torch.device,
    on_bytes: Callable[[int], None] | None = None,
    piece_bytes: int = PIECE_BYTES,
    num_threads: int | None = None,
) -> None:
    """Fill every target; when this returns the data is there.

    Args:
        placements: what goes where; all targets on `device`.
        device: the model's.
        on_bytes: told of the bytes of each piece that was read, one call at a time, from several threads.
        piece_bytes: what is read at a time; a multiple of 8.
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
    """A tensor cut into runs of elements; one that is repeated stays whole."""
    stored, target = placement.stored, placement.target
    if target.shape != stored.shape:
        yield _Piece(stored, stored.offset, stored.nbytes, target)
        return
    flat, itemsize = target.view(-1), FLOATS[stored.dtype].itemsize
    step = piece_bytes // itemsize
    for begin in range(0, flat.numel(), step):
        part = flat[begin : begin + step]
        yield _Piece(stored, stored.offset + begin * itemsize, part.numel() * itemsize, part)


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
            source = source.view(piece.stored.shape)
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
    memory, done = memoryview(into.numpy().data), 0
    while done < piece.nbytes:
        try:
            count = os.preadv(descriptor, [memory[done:]], piece.offset + done)
        except OSError as error:
            raise _unreadable(piece, error.strerror) from error
        if count == 0:
            raise _unreadable(piece, "the file ends before it does")
        done += count


def _unreadable(piece: _Piece, reason: str | None) -> CheckpointError:
    return CheckpointError(f"{piece.stored.file}: tensor {piece.stored.name} cannot be read: {reason}")
