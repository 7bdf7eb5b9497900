"""Who can take a request at all, now or ever, and why not, in words."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cluster.routing.links import Links
from cluster.routing.types import RoutingRequest
from cluster.routing.worker_table import WorkerTable

_Flags = npt.NDArray[np.bool_]


def fits(table: WorkerTable, request: RoutingRequest) -> _Flags:
    """Who can take the request, as far as its length goes, and is ready."""
    fitting: _Flags = table.column("fit_tokens") > request.prompt_tokens
    return fitting


def has_room(table: WorkerTable, request: RoutingRequest) -> _Flags:
    """Of those whom it fits, whose cache and batch have room for it and its first token now, and for all growth."""
    roomy: _Flags = table.column("room_tokens") > request.prompt_tokens
    if request.num_samples > 1:
        roomy &= [worker.has_room(request.prompt_tokens, request.num_samples) for worker in table.workers]
    if request.outlook is not None:
        roomy &= table.column("growth_tokens") >= request.outlook.peak(request.prompt_tokens, request.num_samples)
    return roomy


def takes_more(table: WorkerTable, request: RoutingRequest) -> _Flags:
    """Which workers are not too busy with prompts to be given one now."""
    free: _Flags = table.column("queued_s") <= request.max_queued_s
    return free


def is_hopeless(request: RoutingRequest, prefill: WorkerTable, decode: WorkerTable, links: Links) -> bool:
    """Whether nobody could take the request, even if all were idle and ready. An empty pool may yet fill."""
    if not len(decode) or (request.in_pairs and not len(prefill)):
        return False
    could_d = decode.column("most_tokens") > request.prompt_tokens
    if request.num_samples > 1:
        could_d &= [worker.could_run(request.prompt_tokens, request.num_samples) for worker in decode.workers]
    if request.alone and could_d.any():
        return False
    if not request.in_pairs:
        return True
    could_p = prefill.column("most_tokens") > request.prompt_tokens
    return not links.some_fit(prefill.column("slot")[could_p], decode.column("slot")[could_d])


def unfit(table: WorkerTable, row: int, request: RoutingRequest) -> str:
    """Why a worker cannot take the prompt, in words; empty if it can."""
    worker = table.workers[row]
    traits, needed = worker.traits, worker.blocks(request.prompt_tokens)
    if request.prompt_tokens + 1 > traits.max_model_len:
        return f"{traits.engine_id}: {request.prompt_tokens} prompt tokens, context window {traits.max_model_len}"
    if needed > traits.total_blocks:
        return f"{traits.engine_id}: {needed} blocks needed, {traits.total_blocks} in all"
    if not worker.ready:
        return f"{traits.engine_id}: not ready"
    return ""


def no_room(table: WorkerTable, row: int, request: RoutingRequest) -> str:
    """Why a decode worker has no room for the request now, in words; empty if it has."""
    worker = table.workers[row]
    name, samples = worker.traits.engine_id, request.num_samples
    needed, total = worker.blocks_to_begin(request.prompt_tokens, samples), worker.traits.total_blocks
    if samples > worker.traits.max_num_seqs:
        return f"{name}: n is {samples}, it runs at most {worker.traits.max_num_seqs} sequences at once"
    if needed > total:
        return f"{name}: {needed} blocks needed for n = {samples}, {total} in all"
    if worker.free_slots < samples:
        return f"{name}: its batch is full" if samples == 1 else f"{name}: {worker.free_slots} of {samples} places free"
    if needed > worker.free_blocks:
        return f"{name}: {needed} blocks needed, {worker.free_blocks} free"
    if request.outlook is None:
        return ""
    if (more := request.outlook.peak(request.prompt_tokens, samples)) > worker.growth_tokens:
        peak = worker.peak_tokens + more
        return f"{name}: its requests would grow to about {peak:.0f} tokens, {worker.capacity_tokens} fit"
    return ""


def busy(table: WorkerTable, row: int, request: RoutingRequest) -> str:
    """Why a worker takes no prompt now, in words; empty if it does."""
    worker = table.workers[row]
    if worker.queued_s > request.max_queued_s:
        name = worker.traits.engine_id
        return f"{name}: {worker.queued_s:.3g} s of work before it, {request.max_queued_s:.3g} s allowed"
    return ""
