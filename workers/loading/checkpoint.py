"""Checkpoints, folders in Hugging Face format or GGUF files: finding them, and where in the files each tensor lies."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import huggingface_hub
import torch
from safetensors import SafetensorError, safe_open

from workers.errors import CheckpointError
from workers.loading.config_reader import read_json
from workers.loading.gguf.header import is_gguf
from workers.loading.gguf.tensors import gguf_tensors
from workers.loading.stored_tensor import StoredTensor

logger = logging.getLogger(__name__)

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_WANTED = ["*.json", "model*.safetensors", "*.jinja"]
_LENGTH_BYTES = 8
_LFS_POINTER = b"version https://git-lfs"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[\w.\-]+)?")


def resolve_checkpoint(model: str) -> Path:
    """The folder or GGUF file of a checkpoint: `model` itself when it is there, else downloaded from the hub.

    Args:
        model: a folder, a GGUF file, or a hub id such as `meta-llama/Llama-3.1-8B`.

    Raises:
        CheckpointError: it is neither of these two nor a hub id that can be fetched.
    """
    folder = Path(model).expanduser()
    if folder.is_dir() or is_gguf(folder):
        return folder
    if folder.exists():
        raise CheckpointError(f"{model} is a file; give the folder that holds config.json, or a GGUF file")
    if folder.suffix.lower() == ".gguf":
        raise CheckpointError(f"{model} does not exist")
    if not _HUB_ID.fullmatch(model):
        raise CheckpointError(f"{model!r} is neither a folder nor a hub id (owner/name)")
    try:
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=_WANTED))
    except Exception as error:  # the hub client raises its own, its HTTP library's and the system's errors
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{model!r} is no local folder, and the hub did not provide it: {reason[0]}") from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in order of name, or the GGUF file that it is.

    Where there is a single file, an index beside it is stale: it is not read, as transformers does not.

    Raises:
        CheckpointError: there is none, the index is malformed, or a shard that it names is missing.
    """
    if is_gguf(folder):
        return [folder]
    index, single = folder / _INDEX, folder / _SINGLE
    if single.exists():
        if index.exists():
            logger.warning("%s: %s is read, and not the shards that %s names", folder, _SINGLE, _INDEX)
        return [single]
    if not index.exists():
        if found := sorted(folder.glob("*.gguf")):
            raise CheckpointError(
                f"{folder} is a folder with GGUF files; name the one to be served, such as {found[0]}"
            )
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
        CheckpointError: as `weight_files`, or a file is truncated or not safetensors, or as `gguf_tensors`; names the
            file.
    """
    if is_gguf(folder):
        return gguf_tensors(folder)
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
