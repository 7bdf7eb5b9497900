"""Checkpoints in Hugging Face format: finding the folder, and reading the tensors in it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import torch
from safetensors import SafetensorError, safe_open

from workers.errors import CheckpointError
from workers.models.config_reader import read_json

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_WANTED = ["*.json", "model*.safetensors", "*.jinja"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[\w.\-]+)?")


@dataclass(frozen=True)
class CheckpointTensor:
    """One tensor as stored, and the file that it lies in."""

    file: Path
    name: str
    tensor: torch.Tensor


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

    Raises:
        CheckpointError: there is none, the index is malformed, or a shard that it names is missing.
    """
    index = folder / _INDEX
    if not index.exists():
        if (folder / _SINGLE).exists():
            return [folder / _SINGLE]
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


def iter_weights(folder: Path) -> Iterator[CheckpointTensor]:
    """Every tensor of a checkpoint, one at a time, on the CPU and in the dtype it is stored in.

    Raises:
        CheckpointError: as `weight_files`, or a file is truncated or not safetensors; names the file.
    """
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt", device="cpu") as opened:
                for name in opened.keys():  # noqa: SIM118
                    yield CheckpointTensor(file, name, opened.get_tensor(name))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is truncated or not a safetensors file: {error}") from error
