"""What a GGUF file says of itself: its metadata, and where its tensors lie.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType

from workers.errors import CheckpointError
from workers.loading.gguf.values import Values
from workers.loading.stored_tensor import StoredTensor

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MOST_DIMENSIONS = 4
_LEAST_BYTES_OF_VALUE = 8 + 1 + 4 + 1
_LEAST_BYTES_OF_TENSOR = 8 + 1 + 4 + 8 + 4 + 8
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class GgufHeader:
    """A GGUF file without its tensors' numbers.

    Attributes:
        file: the file.
        metadata: by key; lists of strings are None unless they were asked for.
        tensors: by the name that the file has for them.
    """

    file: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]


def is_gguf(path: Path) -> bool:
    """Whether this is a GGUF file, by its name or its first bytes; a folder is none."""
    if not path.is_file():
        return False
    return path.suffix.lower() == ".gguf" or _first_bytes(path, len(MAGIC)) == MAGIC


def read_header(file: Path, *, string_lists: bool = False) -> GgufHeader:
    """Read what is before the tensors' numbers, and check that the file is as long as it says.

    Args:
        file: the file.
        string_lists: whether lists of strings (a vocabulary's tokens and merges) are wanted.

    Raises:
        CheckpointError: not a whole GGUF file of a version and with tensors that are known; names it and what is wrong.
    """
    try:
        with file.open("rb") as opened:
            if opened.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise CheckpointError(f"{file} is a pointer of Git LFS; fetch the weights with `git lfs pull`")
            size = opened.seek(0, 2)
            if size < len(MAGIC) + 4:
                raise CheckpointError(f"{file} is no GGUF file: it has {size} bytes")
            with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as memory:
                return _read(Values(file, memory), size, string_lists)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error


def _read(values: Values, size: int, string_lists: bool) -> GgufHeader:
    if bytes(values.take(len(MAGIC))) != MAGIC:
        raise values.error(f"is no GGUF file: it does not begin with {MAGIC.decode()}")
    version = values.uint32()
    if version not in _VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
        which = "of a big-endian machine" if swapped else f"of version {version}"
        raise values.error(f"is a GGUF file {which}, only little-endian ones of version 2 and 3 are read")
    num_tensors, num_values = values.uint64(), values.uint64()
    values.check_count(num_tensors, _LEAST_BYTES_OF_TENSOR, "tensors")
    values.check_count(num_values, _LEAST_BYTES_OF_VALUE, "values")
    metadata: dict[str, Any] = {}
    for _ in range(num_values):
        key = values.key()
        if key in metadata:
            raise values.error(f"is damaged: it has {key} twice")
        metadata[key] = values.value(values.uint32(), string_lists)
    _refuse_split(values, metadata)
    described = [_tensor(values) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 8 or alignment % 8:
        raise values.error(f"general.alignment: must be a multiple of 8, not {alignment!r}")
    begin = -(-values.place // alignment) * alignment
    tensors: dict[str, StoredTensor] = {}
    for tensor in described:
        place = begin + tensor.offset
        if tensor.name in tensors or tensor.offset % alignment:
            raise values.error(f"is damaged: tensor {tensor.name} is there twice, or begins at {tensor.offset}")
        if place + tensor.nbytes > size:
            raise values.error(
                f"is truncated: it has {size} bytes, and tensor {tensor.name} ends at byte {place + tensor.nbytes}"
            )
        tensors[tensor.name] = StoredTensor(tensor.file, tensor.name, tensor.dtype, tensor.shape, place, tensor.nbytes)
    return GgufHeader(values.file, metadata, tensors)


def _tensor(values: Values) -> StoredTensor:
    """A tensor's description, with its offset in the data."""
    name, num_dimensions = values.key(), values.uint32()
    if not 1 <= num_dimensions <= _MOST_DIMENSIONS:
        raise values.error(f"is damaged: tensor {name} has {num_dimensions} dimensions")
    shape = tuple(reversed([values.uint64() for _ in range(num_dimensions)]))  # the file has the last one first
    kind, offset = values.uint32(), values.uint64()
    try:
        dtype = GGMLQuantizationType(kind)
    except ValueError:
        raise values.error(f"tensor {name} is of type {kind}, which is none that is known") from None
    block, block_bytes = GGML_QUANT_SIZES[dtype]
    if not all(shape) or shape[-1] % block:
        raise values.error(
            f"is damaged: tensor {name} of shape {shape} is of type {dtype.name}, whose blocks have {block} numbers"
        )
    return StoredTensor(values.file, name, dtype.name, shape, offset, math.prod(shape) // block * block_bytes)


def _refuse_split(values: Values, metadata: Mapping[str, Any]) -> None:
    count = metadata.get("split.count", 1)
    if count not in (0, 1):
        raise values.error(
            f"is one of {count} files that a model was split into, and only whole ones are read; "
            "`llama-gguf-split --merge` puts them together"
        )


def _first_bytes(path: Path, count: int) -> bytes:
    try:
        with path.open("rb") as opened:
            return opened.read(count)
    except OSError:
        return b""
