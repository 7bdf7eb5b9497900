"""Moves tensors from checkpoint files into a model's parameters: several threads, through a little host memory.

Each thread reads pieces of a few MiB into two buffers in turn. On a GPU the buffers are pinned and the copies run on a
stream of the thread's own, so that a buffer is filled while the other is on its way; a dtype is converted on the
device, what is to be arranged otherwise is copied into a view of the parameter there, and what is quantised becomes
numbers there. Beside the model itself nothing larger than the buffers (and a piece's numbers) is ever in memory. Of a
tensor that is loaded in part no other part is read: some columns of a matrix are read row by row.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from workers.errors import CheckpointError
from workers.loading.pieces import Piece, Placement, pieces_of
from workers.loading.runs import Runs, region_shape
from workers.loading.stored_tensor import StoredTensor

PIECE_BYTES = 8 * 2**20
"""At most so much is read at a time: long enough for the bus, short enough for the threads to end together."""

_GPU_THREADS = 8


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
    pieces = deque(piece for placement in placements for piece in pieces_of(placement, piece_bytes))
    if not pieces:
        return
    largest = max(piece.buffer_bytes for piece in pieces)
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


def _open_all(stack: contextlib.ExitStack, placements: Sequence[Placement]) -> dict[Path, int]:
    """A descriptor for each file, closed with the stack; threads read from it at offsets of their own."""
    descriptors = {}
    stored = [placement.stored for placement in placements]
    quantized = [placement.quantized for placement in placements if placement.quantized is not None]
    stored += [each.scales for each in quantized if each.scales is not None]
    for file in dict.fromkeys(tensor.file for tensor in stored):
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

    def move(self, descriptors: dict[Path, int], piece: Piece) -> None:
        """Read a piece and send it on its way."""
        buffer = next(self._buffers)
        buffer.wait()
        values = _read(descriptors, buffer.memory, piece.values, piece.dtype)
        scales = None
        if piece.scales is not None and piece.scale_dtype is not None:
            scales = _read(descriptors, buffer.memory[piece.scales_begin :], piece.scales, piece.scale_dtype)
        with torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext():
            self._put(piece, values, scales)
            buffer.mark()

    def _put(self, piece: Piece, values: torch.Tensor, scales: torch.Tensor | None) -> None:
        target = piece.target
        if piece.storage is not None:
            if not piece.storage.on_host:
                values = values.to(self._device, non_blocking=True)
                scales = None if scales is None else scales.to(self._device, non_blocking=True)
            values = piece.storage.dequantize(values, scales, piece.region, target.dtype)
        elif values.dtype != target.dtype or values.shape != target.shape or not target.is_contiguous():
            values = values.to(self._device, non_blocking=True)  # as it is: converted or spread there, not here
        target.copy_(values, non_blocking=True)

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


def _drain(pieces: deque[Piece], descriptors: dict[Path, int], lane: _Lane, tell: Callable[[int], None]) -> None:
    """A thread's work: pieces until there are no more, or until a thread has failed."""
    try:
        with torch.inference_mode():
            while True:
                try:
                    piece = pieces.popleft()
                except IndexError:
                    break
                lane.move(descriptors, piece)
                tell(piece.values.nbytes)
    except BaseException:
        pieces.clear()
        raise
    finally:
        lane.finish()


def _read(descriptors: dict[Path, int], buffer: torch.Tensor, runs: Runs, dtype: torch.dtype) -> torch.Tensor:
    """The runs one behind the other at the buffer's beginning, as a tensor of the region's shape."""
    staged, size = buffer[: runs.nbytes], runs.run_bytes
    memory, descriptor = memoryview(staged.numpy().data), descriptors[runs.stored.file]
    for i, offset in enumerate(runs.offsets()):
        _read_run(descriptor, memory[i * size : (i + 1) * size], offset, runs.stored)
    return staged.view(dtype).view(region_shape(runs.region))


def _read_run(descriptor: int, memory: memoryview, offset: int, stored: StoredTensor) -> None:
    done = 0
    while done < len(memory):
        try:
            count = os.preadv(descriptor, [memory[done:]], offset + done)
        except OSError as error:
            raise _unreadable(stored, error.strerror) from error
        if count == 0:
            raise _unreadable(stored, "the file ends before it does")
        done += count


def _unreadable(stored: StoredTensor, reason: str | None) -> CheckpointError:
    return CheckpointError(f"{stored.file}: tensor {stored.name} cannot be read: {reason}")
