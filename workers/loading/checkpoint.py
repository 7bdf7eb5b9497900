"""Checkpoints in Hugging Face format: finding the folder, and where in its files each tensor lies."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import torch
from safetensors import SafetensorError, safe_open

from workers.errors import CheckpointError
from workers.loading.config_reader import read_json

logger = logging.getLogger(__name__)

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_WANTED = ["*.json", "model*.safetensors", "*.jinja"]
_LENGTH_BYTES = 8
_LFS_POINTER = b"version https://git-lfs"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[\w.\-]+)?")

Region = tuple[tuple[int, int], ...]
"""A part of a tensor: of each dimension the first index and one past the last."""


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor of a checkpoint lies.

    Attributes:
        file: the file.
        name: the tensor's.
        dtype: as safetensors writes it, such as "BF16".
        shape: its own.
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


def resolve_checkpoint(model: str) -> Path:
    """The folder of a checkpoint: `model` itself when it is a local folder, else downloaded from the hub.

    Args:
        model: a folder, or a hub id such as `meta-llama/Llama-3.1-8B`.

    Raises:
        CheckpointError: it is neither a folder nor a hub id that can be fetched.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{model} is a file; give the folder that holds config.json")
    if not _HUB_ID.fullmatch(model):
        raise CheckpointError(f"{model!r} is neither a folder nor a hub id (owner/name)")
    try:
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=_WANTED))
    except Exception as error:  # the hub client raises its own, its HTTP library's and the system's errors
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{model!r} is no local folder, and the hub did not provide it: {reason[0]}") from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in order of name.

    Where there is a single file, an index beside it is stale: it is not read, as transformers does not.

    Raises:
        CheckpointError: there is none, the index is malformed, or a shard that it names is missing.
    """
    index, single = folder / _INDEX, folder / _SINGLE
    if single.exists():
        if index.exists():
            logger.warning("%s: %s is read, and not the shards that %s names", folder, _SINGLE, _INDEX)
        return [single]
    if not index.exists():
        raise CheckpointError(f"{folder} holds neither {_SINGLE} nor {_INDEX}; only safetensors weights are read")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map must map tensor names to file names")
    files = []
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise CheckpointError(f"{index}: {name!r} is not a file name in the same folder")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing, although {_INDEX} names it")
        files.append(folder / name)
    return files


def stored_tensors(folder: Path) -> list[StoredTensor]:
    """Every tensor of a checkpoint, in the order in which they lie in its files. Reads the files' headers only.

    Raises:
        CheckpointError: as `weight_files`, or a file is truncated or not safetensors; names the file.
    """
    return [tensor for file in weight_files(folder) for tensor in _tensors_of(file)]


def read_tensor(stored: StoredTensor) -> torch.Tensor:
    """One tensor, on the CPU and in the dtype it is stored in.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        with safe_open(stored.file, framework="pt", device="cpu") as opened:
            tensor: torch.Tensor = opened.get_tensor(stored.name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{stored.file}: tensor {stored.name} cannot be read: {error}") from error
    return tensor


def _tensors_of(file: Path) -> list[StoredTensor]:
    """From the header: its length in 8 bytes, then JSON that places each tensor in the bytes that follow it."""
    try:
        with safe_open(file, framework="pt", device="cpu"):
            pass  # its header makes sense, and the file is as long as the header says
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(_LENGTH_BYTES), "little")
            header = json.loads(opened.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        if _is_lfs_pointer(file):
            raise CheckpointError(
                f"{file} is a pointer of Git LFS and not the weights; fetch them with `git lfs pull`"
            ) from error
        raise CheckpointError(f"{file} is truncated or not a safetensors file: {error}") from error
    header.pop("__metadata__", None)
    tensors = []
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        offset = _LENGTH_BYTES + length + begin
        tensors.append(StoredTensor(file, name, entry["dtype"], tuple(entry["shape"]), offset, end - begin))
    return sorted(tensors, key=lambda tensor: tensor.offset)


def _is_lfs_pointer(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            return opened.read(len(_LFS_POINTER)) == _LFS_POINTER
    except OSError:
        return False
