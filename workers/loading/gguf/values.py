"""Reading the values of a GGUF file one after the other, and never past its end.

The `gguf` package's own reader makes numpy views of every element of every list. SmolLM2's vocabulary of 49152 tokens
took it 15 s on a busy machine where this takes 0.4, and every process that reads the file would wait for it.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGUFValueType

from workers.errors import CheckpointError

_LONGEST_KEY = 65535
"""Bytes of a key or of a tensor's name, by the format's specification."""

_NUMBERS: dict[int, np.dtype[Any]] = {
    GGUFValueType.UINT8: np.dtype("<u1"),
    GGUFValueType.INT8: np.dtype("<i1"),
    GGUFValueType.UINT16: np.dtype("<u2"),
    GGUFValueType.INT16: np.dtype("<i2"),
    GGUFValueType.UINT32: np.dtype("<u4"),
    GGUFValueType.INT32: np.dtype("<i4"),
    GGUFValueType.FLOAT32: np.dtype("<f4"),
    GGUFValueType.BOOL: np.dtype("?"),
    GGUFValueType.UINT64: np.dtype("<u8"),
    GGUFValueType.INT64: np.dtype("<i8"),
    GGUFValueType.FLOAT64: np.dtype("<f8"),
}


class Values:
    """The values of a file in order.

    Attributes:
        place: of the next one, bytes from the file's beginning.

    Args:
        file: named in errors.
        memory: what it holds.
    """

    def __init__(self, file: Path, memory: memoryview) -> None:
        self.file = file
        self.place = 0
        self._memory = memory

    def error(self, problem: str) -> CheckpointError:
        """One that names the file."""
        return CheckpointError(f"{self.file}: {problem}")

    def check_count(self, count: int, least_bytes: int, what: str) -> int:
        """Refuse a number of things that the rest of the file cannot hold, before any is read.

        Raises:
            CheckpointError: they would take more than there is.
        """
        if count * least_bytes > len(self._memory) - self.place:
            raise self.error(f"is truncated or damaged: it says that it has {count} {what}")
        return count

    def take(self, size: int) -> memoryview:
        """So many bytes.

        Raises:
            CheckpointError: the file ends before.
        """
        if size > len(self._memory) - self.place:
            raise self.error(f"is truncated or damaged: it ends within its header, after {len(self._memory)} bytes")
        found = self._memory[self.place : self.place + size]
        self.place += size
        return found

    def uint32(self) -> int:
        """An unsigned number of 4 bytes."""
        return int(struct.unpack("<I", self.take(4))[0])

    def uint64(self) -> int:
        """An unsigned number of 8 bytes."""
        return int(struct.unpack("<Q", self.take(8))[0])

    def string(self) -> str:
        """Text, behind its length.

        Raises:
            CheckpointError: it is not UTF-8.
        """
        try:
            return str(self.take(self.uint64()), "utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"holds text that is not UTF-8, which ends at byte {self.place}") from error

    def key(self) -> str:
        """A name of a value or of a tensor."""
        begin, name = self.place, self.string()
        if not name or self.place - begin - 8 > _LONGEST_KEY:
            raise self.error(f"is damaged: the name at byte {begin} has {len(name)} characters")
        return name

    def value(self, kind: int, keep: bool) -> Any:
        """A value of that kind.

        Args:
            kind: a `GGUFValueType`.
            keep: False: a list of strings is passed over, and None returned.

        Raises:
            CheckpointError: no such kind.
        """
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind == GGUFValueType.ARRAY:
            return self._list(keep)
        if kind not in _NUMBERS:
            raise self.error(f"is damaged: a value at byte {self.place} is of kind {kind}")
        return np.frombuffer(self.take(_NUMBERS[kind].itemsize), _NUMBERS[kind])[0].item()

    def _list(self, keep: bool) -> list[Any] | None:
        kind, count = self.uint32(), self.uint64()
        if kind in _NUMBERS:
            dtype = _NUMBERS[kind]
            self.check_count(count, dtype.itemsize, "numbers in a list")
            numbers: list[Any] = np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
            return numbers
        if kind != GGUFValueType.STRING:
            raise self.error(f"is damaged or too new: a list at byte {self.place} has elements of kind {kind}")
        self.check_count(count, 8, "strings in a list")
        if keep:
            return [self.string() for _ in range(count)]
        for _ in range(count):
            self.take(self.uint64())
        return None
