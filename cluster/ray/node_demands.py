"""What the pools ask of a cluster whose nodes may still come.

A pool that names resources or labels has nodes of its own kind. Its workers wait for them: an actor that finds no room
is what makes Ray's autoscaler add a node. A pool that names none must fit into the cluster as it is.
"""

from __future__ import annotations

from collections.abc import Mapping

from cluster.config.groups import WorkerGroup, groups_of
from cluster.config.schema import ServiceConfig
from workers.errors import ConfigError


def check_cpus(config: ServiceConfig, present: Mapping[str, float]) -> None:
    """Refuse pools that do not fit.

    Args:
        config: the service's.
        present: the cluster's resources, as `ray.cluster_resources` has them.

    Raises:
        ConfigError: the pools that do not wait for nodes ask for more CPUs than there are.
    """
    needed = sum(
        group.ranks * group.settings.num_cpus for group in groups_of(config) if not group.settings.waits_for_nodes
    )
    available = present.get("CPU", 0.0)
    if available < needed:
        raise ConfigError(f"the workers need {needed:g} CPUs, the Ray cluster has {available:g}")


def gpus_in_sight(config: ServiceConfig, present: Mapping[str, float]) -> float:
    """GPUs that the pools can be placed on: those of the cluster, or those of the nodes that will come for them."""
    coming = sum(
        group.ranks * (1.0 if group.settings.num_gpus is None else group.settings.num_gpus)
        for group in groups_of(config)
        if group.settings.waits_for_nodes and group.settings.asks_for_gpus
    )
    return max(present.get("GPU", 0.0), coming)


def awaited_nodes(config: ServiceConfig, present: Mapping[str, float]) -> list[str]:
    """For each resource that a pool waits for, one line that says how much of it is there."""
    return [
        f"{_in_words(group)} waits for nodes: it needs {group.ranks * amount:g} {resource}, "
        f"the Ray cluster has {present.get(resource, 0.0):g}"
        for group in groups_of(config)
        for resource, amount in (group.settings.resources or {}).items()
        if present.get(resource, 0.0) < group.ranks * amount
    ]


def _in_words(group: WorkerGroup) -> str:
    return f"the group {group.name} of the {group.role} pool" if group.name else f"the {group.role} pool"
