"""From a checkpoint folder (or only its config.json) to a model that is ready to run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from attention.platform import Platform
from attention.spec import FP8, AttentionNeeds, Phase
from workers.errors import CheckpointError, ConfigError
from workers.loading.checkpoint import resolve_checkpoint, stored_tensors, weight_files
from workers.loading.gguf.header import is_gguf
from workers.loading.gguf.tensors import gguf_form
from workers.loading.kv_scales import Place, kv_scale_place, read_kv_scales
from workers.loading.pieces import Placement
from workers.loading.placements import placement
from workers.loading.stored_tensor import StoredTensor
from workers.loading.weight_stream import load_tensors
from workers.models.attention_backend import choose_backends
from workers.models.causal_lm import CausalLM, attention_specs
from workers.models.config.model_config import DTYPES, ModelConfig
from workers.models.expert_weights import keeping_mxfp4
from workers.models.identity import kv_identity
from workers.models.random_weights import fill_randomly
from workers.models.registry import read_model
from workers.models.weight_map import WeightMap
from workers.parallel.group import SINGLE, TensorParallelGroup

logger = logging.getLogger(__name__)

LOAD_FORMATS = ("auto", "dummy")
KV_CACHE_DTYPES: dict[str, torch.dtype | None] = {"auto": None, "fp8": FP8}

Progress = Callable[[int, int], None]
"""Called with the bytes of weights that this rank has read so far, and those that it will read in all."""


def resolve_dtype(dtype: str, stored: str, platform: Platform | None = None) -> torch.dtype:
    """The dtype to run in: `auto` is the checkpoint's own; where the device has no bfloat16, float16 with a warning.

    Args:
        dtype: auto, float32, bfloat16 or float16; what is named is taken, whether a device has it or not.
        stored: the checkpoint's own, `ModelConfig.dtype`.
        platform: where the model will run; None: not known yet.

    Raises:
        ConfigError: none of those.
    """
    name = stored if dtype == "auto" else dtype
    if name not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is none of auto, {', '.join(DTYPES)}")
    resolved: torch.dtype = getattr(torch, name)
    lack = platform.lacks(resolved) if dtype == "auto" and platform is not None else None
    if lack is None:
        return resolved
    logger.warning("the checkpoint is %s, and %s: running it in float16", name, lack)
    return torch.float16


def load_model(
    model: str | Path,
    dtype: str = "auto",
    device: torch.device | str = "cpu",
    block_size: int = 16,
    backend_name: str | None = None,
    progress: Progress | None = None,
    load_format: str = "auto",
    seed: int = 0,
    phase: Phase | None = None,
    local_prefill: bool = False,
    kv_cache_dtype: str = "auto",
    measurements: Path | None = None,
    group: TensorParallelGroup = SINGLE,
    max_model_len: int | None = None,
    expert_weights: str = "auto",
) -> CausalLM:
    """Load a model, or one rank's shard of it, of which alone the weights are read.

    Args:
        model: a checkpoint folder, a GGUF file or a hub id.
        dtype: see `resolve_dtype`.
        device: where it will run.
        block_size: tokens in a KV block.
        backend_name: the attention backend; None chooses the best usable one.
        progress: told how far reading is.
        load_format: auto reads the weights; dummy draws them at random, so that config.json is enough.
        seed: of the random weights.
        phase: the batches that will come, for the choice of a backend; None: any.
        local_prefill: with phase decode: prompts will come, too, and get a backend of their own.
        kv_cache_dtype: auto (as the activations) or fp8, with the checkpoint's scales where it has them, else 1.
        measurements: where `baton backends --measure` keeps its result, which the choice of a backend follows.
        group: the ranks that share the model; this one's device is `device`. Nothing is communicated here.
        max_model_len: tokens of the longest sequence that will come; None: what the model was made for.
        expert_weights: of experts that the checkpoint holds in MXFP4: see `keeping_mxfp4`.

    Raises:
        CheckpointError: the checkpoint is missing, broken, or of a kind that Baton does not run.
        ConfigError: an unknown dtype, load format, form of experts or attention backend, none that can run this model
            here, a model that does not fit the GPU, one that the group's size does not divide, or whose positions do
            not reach so far.
    """
    if load_format not in LOAD_FORMATS:
        raise ConfigError(f"load_format {load_format!r} is none of {', '.join(LOAD_FORMATS)}")
    if kv_cache_dtype not in KV_CACHE_DTYPES:
        raise ConfigError(f"kv_cache_dtype {kv_cache_dtype!r} is none of {', '.join(KV_CACHE_DTYPES)}")
    folder = resolve_checkpoint(str(model))
    model_class, config = read_model(folder)
    device = torch.device(device)
    resolved = resolve_dtype(dtype, config.dtype, Platform.of(device))
    cache_dtype = KV_CACHE_DTYPES[kv_cache_dtype]
    specs = attention_specs(config, cache_dtype, group.size)
    kinds = [AttentionNeeds(spec, resolved, block_size, phase) for spec in specs]
    backends = choose_backends(kinds, device, name=backend_name, measurements=measurements, local_prefill=local_prefill)
    weights = weight_map(model_class, config, group)
    names = None
    if load_format != "dummy" and weights.in_mxfp4:
        names = {weights.canonical(stored.name) for stored in stored_tensors(folder)}
    kept = keeping_mxfp4(expert_weights, weights, names, resolved, device, phase)
    in_mxfp4, weights = (False, weights) if kept is None else (True, kept)
    try:
        loaded = model_class(
            config, backends, block_size, resolved, device, cache_dtype, group, max_model_len, in_mxfp4
        )
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(device)
        raise ConfigError(
            f"the model's weights take {weights.num_bytes(resolved) / 1e9:.1f} GB, the GPU has "
            f"{free / 1e9:.1f} GB free of {total / 1e9:.1f} GB"
        ) from error
    with torch.inference_mode():
        if load_format == "dummy":
            fill_randomly(loaded, weights, seed)
        else:
            load_weights(loaded, weights, folder, progress)
        loaded.identity = kv_identity(loaded, folder)
        loaded.process_weights()
        loaded.weights_bytes = weights.num_bytes(resolved)
    return loaded


def weight_map(model_class: type[CausalLM], config: ModelConfig, group: TensorParallelGroup = SINGLE) -> WeightMap:
    """Where each tensor of a checkpoint goes, on one rank of a group.

    Raises:
        ConfigError: the group's size does not divide the model.
    """
    config.check_divisible(group.size)
    weights = WeightMap(group.rank, group.size)
    model_class.map_weights(config, weights)
    return weights


def model_bytes(
    model_class: type[CausalLM], config: ModelConfig, dtype: torch.dtype, group: TensorParallelGroup = SINGLE
) -> int:
    """Bytes of the weights that a rank holds of a model when they are all loaded in `dtype`."""
    return weight_map(model_class, config, group).num_bytes(dtype)


def load_weights(model: CausalLM, weights: WeightMap, folder: Path, progress: Progress | None = None) -> None:
    """Fill a model's parameters from a checkpoint, converting to their dtype, and take the scales of an FP8 KV cache.

    A rank reads its shard and nothing else; the scales of a layer are all ranks'.

    The whole checkpoint is checked by its headers before any of it is read.

    Raises:
        CheckpointError: a file or tensor is missing, misshapen or unknown; names file and tensor.
    """
    placements, scales = _places(model, weights, folder)
    total = sum(placement.nbytes for placement in placements)
    read = 0

    def count(num_bytes: int) -> None:
        nonlocal read
        read += num_bytes
        if progress is not None:
            progress(read, total)

    load_tensors(placements, model.device, count)
    if model.kv_cache_dtype == FP8:
        for layer, layer_scales in read_kv_scales(scales).items():
            model.set_kv_scales(layer, layer_scales)
    if progress is not None:
        progress(total, total)


def _places(model: CausalLM, weights: WeightMap, folder: Path) -> tuple[list[Placement], dict[Place, StoredTensor]]:
    """Where every tensor of a checkpoint, or this rank's part of it, goes, and the scales among them."""
    config, parameters = model.config, dict(model.named_parameters())
    tensors = stored_tensors(folder)
    names = {weights.canonical(stored.name) for stored in tensors}
    weights = weights.resolved(names)
    if config.fp8_blocks is not None:
        weights = weights.in_fp8_blocks(config.fp8_blocks, names)
    if is_gguf(folder):
        weights = weights.adapted(gguf_form(folder))
    wanted = dict.fromkeys([*weights.targets, *weights.scales])
    found: dict[str, StoredTensor] = {}
    kv_scales: dict[Place, StoredTensor] = {}
    for stored in tensors:
        name = weights.canonical(stored.name)
        if name in wanted:
            if name in found:
                both = f"{found[name].file.name} and {stored.file.name}"
                logger.warning("%s: tensor %s is in %s; the last one is read", folder, stored.name, both)
            found[name] = stored
        elif (scale := kv_scale_place(name, config.num_layers)) is not None:
            kv_scales[scale] = stored
        elif not weights.is_unused(name):
            raise CheckpointError(f"{stored.file}: tensor {stored.name} has no place in a {config.family} model")
    missing = [name for name in wanted if name not in found]
    if missing:
        files = weight_files(folder)
        where, more = files[0] if len(files) == 1 else folder, len(missing) - 1
        raise CheckpointError(f"{where}: tensor {missing[0]} is missing" + (f", and {more} more" if more else ""))
    placements = [
        placement(name, target, found, parameters)  # as they lie in the files
        for name in found
        for target in weights.targets.get(name, ())
    ]
    return placements, kv_scales
