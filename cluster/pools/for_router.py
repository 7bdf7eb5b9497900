"""What the router is told of the pools."""

from __future__ import annotations

from collections.abc import Iterable

from cluster.pools.member import Member
from cluster.routing.demand import Bar
from cluster.routing.pairs import Way
from cluster.routing.worker_table import WorkerTraits
from workers.host import WorkerInfo


def traits_of(members: Iterable[Member]) -> dict[WorkerTraits, bool]:
    """The workers that have said who they are, and whether each is ready.

    One that is being replaced counts as it was, and as not ready: what fits nobody else is to wait for its successor.
    """
    return {_traits(info): member.state == "ready" for member in members if (info := member.foreseeable) is not None}


def ways_of(prefill: Iterable[Member]) -> dict[str, dict[str, Way]]:
    """What the ways from these prefill workers cost, by decode worker."""
    return {member.engine_id: member.ways for member in prefill if member.ways}


def bars_of(members: Iterable[Member]) -> dict[tuple[str, str], Bar]:
    """The pairs that cannot work together, whichever of the two has found out."""
    bars: dict[tuple[str, str], Bar] = {}
    for member in members:
        known = [(peer, Bar(why, forever=False)) for peer, why in member.estranged.items()]
        known += [(peer, Bar(why, forever=True)) for peer, why in member.refusals.items()]
        for peer, bar in known:
            prefill, decode = (member.engine_id, peer) if member.handle.role == "prefill" else (peer, member.engine_id)
            bars[prefill, decode] = bar
    return bars


def _traits(info: WorkerInfo) -> WorkerTraits:
    layout = info.engine.layout
    return WorkerTraits(
        engine_id=info.engine.engine_id,
        max_model_len=info.max_model_len,
        block_size=layout.block_size,
        total_blocks=info.num_blocks,
        max_num_seqs=info.max_num_seqs,
        capability=info.capability,
        kv_token_bytes=len(info.engines) * layout.num_layers * layout.block_bytes / layout.block_size,
        num_layers=layout.num_layers,
        chunk_tokens=info.max_num_batched_tokens,
    )
