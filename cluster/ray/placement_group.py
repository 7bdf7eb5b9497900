"""Where Ray puts the ranks of a worker: all on one node, each with resources of its own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.config.load import CUDA_DEVICES_VARIABLE, visible_gpus
from workers.errors import ConfigError

_WAIT_S = 60.0
_NODE_WAIT_S = 1800.0  # a cloud takes minutes for a node, and to set it up
_LEAST_CPUS = 0.001  # a bundle of a placement group must hold something
_KEEP_CUDA_DEVICES = "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class RankResources:
    """What each rank of a worker gets.

    Attributes:
        num_cpus: that Ray reserves for it.
        num_gpus: that Ray reserves for it.
        gpu_by_rank: rank i gets GPU i of those that this process may use, whatever Ray would choose.
        env: of its process.
        custom: Ray resources of the operator's own that it takes.
        labels: that its node has.
    """

    num_cpus: float
    num_gpus: float
    gpu_by_rank: bool = False
    env: Mapping[str, str] = field(default_factory=dict)
    custom: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)


class RankPlacement:
    """The room for a worker's actors. A worker of one rank goes wherever Ray has room.

    Args:
        name: of the worker.
        size: its ranks; more than one share a node.
        resources: of each.
    """

    def __init__(self, name: str, size: int, resources: RankResources) -> None:
        self._name = name
        self._size = size
        self._resources = resources
        self._group: Any = None
        if size > 1:
            bundle = {"CPU": max(_LEAST_CPUS, resources.num_cpus), **resources.custom}
            if resources.num_gpus:
                bundle["GPU"] = resources.num_gpus
            self._group = placement_group(
                [dict(bundle) for _ in range(size)],
                strategy="STRICT_PACK",
                bundle_label_selector=[dict(resources.labels) for _ in range(size)] if resources.labels else None,
            )

    def create(self, actor_class: type[Any], rank: int, *args: object) -> Any:
        """An actor for a rank; its process starts when there is room."""
        env = dict(self._resources.env)
        if self._resources.gpu_by_rank:
            names = visible_gpus()
            env |= {_KEEP_CUDA_DEVICES: "1", CUDA_DEVICES_VARIABLE: names[rank] if names else str(rank)}
        options: dict[str, Any] = {
            "num_cpus": self._resources.num_cpus,
            "num_gpus": self._resources.num_gpus,
            "resources": dict(self._resources.custom),
            "max_restarts": 0,
            "max_concurrency": 1000,
            "runtime_env": {"env_vars": env},
        }
        if self._group is not None:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(self._group, rank)
        elif self._resources.labels:
            options["label_selector"] = dict(self._resources.labels)
        return ray.remote(actor_class).options(**options).remote(*args)

    async def wait(self) -> None:
        """Until there is room for all ranks of a group.

        Raises:
            ConfigError: no node has it.
        """
        patience_s = _NODE_WAIT_S if self._resources.custom or self._resources.labels else _WAIT_S
        if self._group is not None and not await asyncio.to_thread(self._group.wait, patience_s):
            wanted = f"{self._resources.num_cpus:g} CPUs and {self._resources.num_gpus:g} GPUs"
            raise ConfigError(
                f"{self._name}: no node of the Ray cluster has {wanted} for each of its {self._size} ranks; "
                f"{patience_s:g} s were waited for it"
            )

    def remove(self) -> None:
        """Give the room back; the actors must have been ended."""
        if self._group is not None:
            with contextlib.suppress(Exception):
                remove_placement_group(self._group)
