"""What the router is told of the pools."""

from __future__ import annotations

from collections.abc import Iterable

from cluster.pools.replica import Replica
from cluster.routing.types import Incompatibility
from cluster.routing.worker_table import WorkerTraits
from kv_transfer.link_cost import LinkCost
from workers.worker_host import WorkerInfo


def traits_of(replicas: Iterable[Replica]) -> dict[WorkerTraits, bool]:
    """The workers that have said who they are, and whether each is ready.

    One that is being replaced counts as it was, and as not ready: what fits nobody else is to wait for its successor.
    """
    return {
        _traits(info, replica.group_key): replica.state == "ready"
        for replica in replicas
        if (info := replica.foreseeable) is not None
    }


def links_of(prefill: Iterable[Replica]) -> dict[str, dict[str, LinkCost]]:
    """What the links from these prefill workers cost, by decode worker."""
    return {replica.engine_id: replica.links for replica in prefill if replica.links}


def incompatibilities_of(replicas: Iterable[Replica]) -> dict[tuple[str, str], Incompatibility]:
    """The pairs that cannot work together, whichever of the two has found out."""
    incompatibilities: dict[tuple[str, str], Incompatibility] = {}
    for replica in replicas:
        known = [(peer, Incompatibility(why, forever=False)) for peer, why in replica.unreachable_peers.items()]
        known += [(peer, Incompatibility(why, forever=True)) for peer, why in replica.unsupported_reasons.items()]
        for peer, incompatibility in known:
            prefill, decode = (
                (replica.engine_id, peer) if replica.handle.role == "prefill" else (peer, replica.engine_id)
            )
            incompatibilities[prefill, decode] = incompatibility
    return incompatibilities


def _traits(info: WorkerInfo, group: str) -> WorkerTraits:
    layout = info.engine.layout
    return WorkerTraits(
        engine_id=info.engine.engine_id,
        max_model_len=info.max_model_len,
        block_size=layout.primary.block_size,
        total_blocks=info.num_blocks,
        max_num_seqs=info.max_num_seqs,
        step_times=info.step_times,
        kv_token_bytes=len(info.engines) * layout.bytes_per_token,
        num_layers=layout.num_layers,
        chunk_tokens=info.max_num_batched_tokens,
        blocks_per_sequence=info.blocks_per_sequence,
        kind=f"{group} {info.device} {info.attention_backend}",
    )
