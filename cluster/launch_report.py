"""What a start says while it goes on, one line at a time."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence

import torch

from cluster.config.groups import WorkerGroup
from cluster.worker_handle import LoadProgress, StartProgress
from workers.loading.gguf.storage import is_block_format
from workers.loading.stored_tensor import StoredTensor
from workers.worker_host import WorkerInfo


def group_size(group: WorkerGroup, device: str) -> str:
    """How many workers a group has, of how many ranks, and where."""
    size = group.settings.tensor_parallel_size
    ranks = f" of {size} ranks" if size > 1 else ""
    return f"{group.settings.replicas} {group.label} workers{ranks} on {device}"


def in_words(parts: Sequence[str]) -> str:
    """A list as a sentence has it: a, b and c."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def worker_line(worker: WorkerInfo) -> str:
    """What a worker that is ready has: its device, its backend, and what it takes of the device's memory."""
    memory, block_size = worker.memory, worker.engine.layout.primary.block_size
    graphs = f", {memory.num_graphs} CUDA graphs {readable_size(memory.graphs_bytes)}" if memory.num_graphs else ""
    return (
        f"{worker.name} on {worker.device}: {worker.attention_backend}, weights {readable_size(memory.weights_bytes)}, "
        f"{worker.num_blocks} KV blocks of {block_size} tokens "
        f"({worker.num_blocks * block_size} tokens, {readable_size(memory.kv_cache_bytes)}){graphs}"
        + (", on each" if len(worker.engines) > 1 else "")
    )


def context_line(asked: int | None, served: int, positions: int) -> str | None:
    """That the context window is shorter than the model's, where nobody has asked for that; None: it is not."""
    if asked is not None or served >= positions:
        return None
    return (
        f"the context window is {served} tokens, what the smallest KV cache holds, and not the model's {positions}: "
        "enlarge kv_cache_gb or num_blocks of both pools (on a GPU gpu_memory_utilization) for more, or set "
        "model.max_model_len to be refused where it does not fit"
    )


def weights_size(num_bytes: int, dtype: torch.dtype, stored: Sequence[StoredTensor]) -> str:
    """How large the weights are in each worker, and in the file where they are quantised there and not here.

    Args:
        num_bytes: in a worker.
        dtype: there.
        stored: the checkpoint's tensors; empty: none are read.
    """
    of_formats: Counter[str] = Counter()
    for tensor in stored:
        of_formats[tensor.dtype] += tensor.nbytes
    size, file_size = f"{readable_size(num_bytes)} each", readable_size(of_formats.total())
    if not any(map(is_block_format, of_formats)):
        return size
    formats = ", ".join(name for name, _ in of_formats.most_common())
    return f"{size} in {str(dtype).removeprefix('torch.')}, out of {file_size} of {formats} in the file"


def readable_size(num_bytes: int) -> str:
    """In GB or MB, which are powers of ten."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def progress_lines(report: Callable[[str], None]) -> LoadProgress:
    """Progress of the workers' starts as lines, one for every tenth of a worker's weights and third of its graphs."""
    shown: dict[tuple[str, str], int] = {}
    lock = threading.Lock()

    def show(name: str, progress: StartProgress) -> None:
        parts = 10 if progress.stage == "weights" else 3
        part = parts * progress.done // progress.total if progress.total else 0
        with lock:
            if part <= shown.get((name, progress.stage), 0):
                return
            shown[name, progress.stage] = part
        if progress.stage == "weights":
            report(f"{name}: {progress.done / 1e6:.1f} of {progress.total / 1e6:.1f} MB of weights")
        else:
            report(f"{name}: captured {progress.done} of {progress.total} CUDA graphs")

    return show
