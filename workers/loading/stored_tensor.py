"""Where a tensor lies in a file, and parts of tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

Region = tuple[tuple[int, int], ...]
"""A part of a tensor: of each dimension the first index and one past the last."""


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor of a checkpoint lies.

    Attributes:
        file: the file.
        name: the tensor's.
        dtype: as the file names it: "BF16" in safetensors, "Q4_1" in GGUF.
        shape: of its numbers where they are quantised in blocks of their own (GGUF), else of what is stored.
        offset: of its first byte in the file; the elements follow each other in row-major order.
        nbytes: how many bytes it has.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def whole(shape: tuple[int, ...]) -> Region:
    """All of a tensor of that shape."""
    return tuple((0, length) for length in shape)
