"""What tests have ranks do: in a module of its own, so that other processes can import it."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from paged_run import PagedRun
from workers.models.loader import load_model
from workers.parallel.errors import TensorParallelError
from workers.parallel.group import TensorParallelGroup

PROMPTS = [[(i * 37 + length * 11) % 480 + 3 for i in range(length)] for length in (1, 19, 40)]
NUM_TOKENS = 8


@dataclass(frozen=True)
class ModelRun:
    """What a model said: its logits after every token of a prompt, and the tokens that it chose for several."""

    logits: torch.Tensor
    tokens: list[list[int]]
    num_kv_heads: int


def run_model(group: TensorParallelGroup, folder: Path, **settings: Any) -> ModelRun:
    """Prefill a prompt in two chunks; then complete all prompts, prefilled alone and decoded together."""
    decoder = load_model(folder, device=group.device, block_size=16, group=group, **settings)
    run = PagedRun(decoder, num_sequences=len(PROMPTS) + 1, max_tokens=64)
    last = len(PROMPTS)
    logits = torch.cat([run.step({last: PROMPTS[-1][:25]})[0], run.step({last: PROMPTS[-1][25:]})[0]])
    return ModelRun(logits.cpu(), run.greedy(PROMPTS, NUM_TOKENS), decoder.kv_cache_groups[0].num_kv_heads)


def run_models(group: TensorParallelGroup, jobs: dict[str, tuple[Path, dict[str, Any]]]) -> dict[str, ModelRun]:
    """`run_model` on each folder with its settings."""
    return {name: run_model(group, folder, **settings) for name, (folder, settings) in jobs.items()}


def call_collectives(group: TensorParallelGroup) -> dict[str, Any]:
    """Each collective once and more."""
    with torch.inference_mode():
        mine = torch.full((3, 2), float(10**group.rank), device=group.device)
        summed = group.all_reduce(mine)
        parts = torch.arange(4, device=group.device).view(2, 2).bfloat16() + 10 * group.rank
        out = torch.zeros(2, 2 * group.size, dtype=torch.bfloat16, device=group.device)
        noise = torch.randn(257, generator=torch.Generator().manual_seed(group.rank)).to(group.device)
        result = {
            "in place": summed is mine,
            "sum": summed.cpu(),
            "gathered": group.all_gather(parts).cpu(),
            "out": group.all_gather(parts, out) is out,
            "gathered there": out.cpu(),
            "noise": {dtype: group.all_reduce(noise.to(dtype)).cpu() for dtype in (torch.float32, torch.bfloat16)},
            "least": [group.agree_min(2**40 + group.rank), group.agree_min(-group.rank)],
            "sockets": listening_addresses(),
        }
    group.barrier()
    group.close()
    group.close()
    return {**result, "closed": not dist.is_initialized()}


def lose_a_rank(group: TensorParallelGroup) -> list[str]:
    """The last rank dies; what the others hear of it, from the device's collective and from the host's."""
    if group.rank == group.size - 1:
        os._exit(0)
    return [_failure(lambda: group.all_reduce(torch.ones(4))), _failure(lambda: group.agree_min(1))]


def _failure(call: Any) -> str:
    try:
        call()
    except TensorParallelError as error:
        return str(error)
    return "no error"


def listening_addresses() -> set[str]:
    """The addresses on which this process accepts TCP connections."""
    links = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_open(fd)]
    inodes = {link.removeprefix("socket:[").rstrip("]") for link in links if link.startswith("socket:")}
    addresses = set()
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and rest[5] in inodes:
                words = bytes.fromhex(local.split(":")[0])
                swapped = b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))
                addresses.add(socket.inet_ntop(family, swapped))
    return addresses


def _is_open(fd: str) -> bool:
    return os.path.islink(f"/proc/self/fd/{fd}")
