"""From a checkpoint folder (or only its config.json) to a `Decoder` that is ready to run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from attention.errors import AttentionBackendError
from attention.selector import select_backend
from workers.errors import CheckpointError, ConfigError
from workers.models.checkpoint import CheckpointTensor, iter_weights, resolve_checkpoint, weight_files
from workers.models.config import DTYPES, ModelConfig
from workers.models.decoder import Decoder, attention_spec
from workers.models.weights import is_unused, weight_targets

LOAD_FORMATS = ("auto", "dummy")

Progress = Callable[[int, int], None]
"""Called with the bytes read so far and the bytes of all weight files."""


def resolve_dtype(dtype: str, config: ModelConfig) -> torch.dtype:
    """The dtype to run in: `auto` is the checkpoint's own.

    Raises:
        ConfigError: not auto, float32, bfloat16 or float16.
    """
    name = config.dtype if dtype == "auto" else dtype
    if name not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is none of auto, {', '.join(DTYPES)}")
    resolved: torch.dtype = getattr(torch, name)
    return resolved


def load_model(
    model: str | Path,
    dtype: str = "auto",
    device: torch.device | str = "cpu",
    block_size: int = 16,
    backend_name: str | None = None,
    progress: Progress | None = None,
    load_format: str = "auto",
    seed: int = 0,
) -> Decoder:
    """Load a model.

    Args:
        model: a checkpoint folder or a hub id.
        dtype: auto (the checkpoint's), float32, bfloat16 or float16.
        device: where it will run.
        block_size: tokens in a KV block.
        backend_name: the attention backend; None chooses the best usable one.
        progress: told how far reading is.
        load_format: auto reads the weights; dummy draws them at random, so that config.json is enough.
        seed: of the random weights.

    Raises:
        CheckpointError: the checkpoint is missing, broken, or of a kind that Baton does not run.
        ConfigError: an unknown dtype, load format or attention backend, or none that can run this model here.
    """
    if load_format not in LOAD_FORMATS:
        raise ConfigError(f"load_format {load_format!r} is none of {', '.join(LOAD_FORMATS)}")
    folder = resolve_checkpoint(str(model))
    config = ModelConfig.from_file(folder)
    resolved, device = resolve_dtype(dtype, config), torch.device(device)
    specs = [attention_spec(config, window) for window in dict.fromkeys(config.sliding_windows)]
    try:
        backend = select_backend(device, resolved, specs, block_size, backend_name).backend
    except AttentionBackendError as error:
        raise ConfigError(str(error)) from error
    decoder = Decoder(config, backend, block_size, resolved, device)
    with torch.inference_mode():
        if load_format == "dummy":
            fill_randomly(decoder, seed)
        else:
            load_weights(decoder, folder, progress)
        decoder.pack()
    return decoder


def fill_randomly(decoder: Decoder, seed: int) -> None:
    """Draw weights from a normal distribution of deviation 0.02; norms become ones, biases zeros."""
    generator = torch.Generator(device=decoder.device).manual_seed(seed)
    for name, parameter in decoder.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0)
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            parameter.normal_(0.0, 0.02, generator=generator)


def load_weights(decoder: Decoder, folder: Path, progress: Progress | None = None) -> None:
    """Fill a decoder's parameters from a checkpoint, converting to their dtype.

    Raises:
        CheckpointError: a file or tensor is missing, misshapen or unknown; names file and tensor.
    """
    targets = weight_targets(decoder.config)
    parameters = dict(decoder.named_parameters())
    files = weight_files(folder)
    total = sum(file.stat().st_size for file in files)
    read = 0
    for stored in iter_weights(folder):
        read += stored.tensor.nbytes
        if progress is not None:
            progress(read, total)
        if stored.name not in targets:
            if is_unused(stored.name, decoder.config):
                continue
            raise CheckpointError(
                f"{stored.file}: tensor {stored.name} has no place in a {decoder.config.family} model"
            )
        target = targets.pop(stored.name)
        _check_tensor(stored, target.shape)
        parameters[target.parameter][target.begin : target.end].copy_(stored.tensor)
    if targets:
        where = files[0] if len(files) == 1 else folder
        first, more = next(iter(targets)), len(targets) - 1
        raise CheckpointError(f"{where}: tensor {first} is missing" + (f", and {more} more" if more else ""))
    if progress is not None:
        progress(total, total)


def _check_tensor(stored: CheckpointTensor, shape: tuple[int, ...]) -> None:
    found = tuple(stored.tensor.shape)
    if found != shape:
        raise CheckpointError(f"{stored.file}: tensor {stored.name} has shape {found} where {shape} is expected")
    if not stored.tensor.is_floating_point() or stored.tensor.dtype.itemsize < 2:
        raise CheckpointError(
            f"{stored.file}: tensor {stored.name} has dtype {stored.tensor.dtype}, not a float of 16+ bits"
        )
