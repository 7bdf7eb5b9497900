"""How many layers of a prompt one WRITE carries: as configured, or as suits the prompt and the path."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from attention.kv_cache import KVCacheSpec, layer_places
from kv_transfer.connector import KVConnector
from workers.runner.step_times import StepTimes


class LayersPerWrite:
    """Chooses for every part of a handoff; the reasoning is `kv_transfer.link_cost.layers_per_write`'s.

    Attributes:
        step_times: the worker's, once it is measured; without it compute is taken to hide nothing.

    Args:
        connector: knows what the path to each decode worker costs.
        groups: the model's cache groups.
        fixed: layers, whatever the prompt; None: choose.
        share_after_attention: of the time of a layer, given the tokens of a step: what its MLP and output take.
    """

    def __init__(
        self,
        connector: KVConnector,
        groups: Sequence[KVCacheSpec],
        fixed: int | None,
        share_after_attention: Callable[[int], float],
    ) -> None:
        self.step_times = StepTimes()
        self._connector = connector
        self._groups = groups
        self._num_layers = len(layer_places(groups))
        self._fixed = fixed
        self._share_after_attention = share_after_attention

    def choose(self, decode_engine: str, group: int, num_blocks: int, num_tokens: int) -> int:
        """Layers of a cache group in a WRITE to this engine.

        The shortest prompt that was measured takes as long as launching its kernels does; what a longer one takes
        beyond that, the launching thread is idle.

        Args:
            decode_engine: where the blocks go.
            group: the cache group.
            num_blocks: that a step completes of the prompt.
            num_tokens: that the step computes, of all prompts in it.
        """
        if self._fixed is not None:
            return self._fixed
        step_s = self.step_times.prefill_seconds(num_tokens)
        launch_s = self.step_times.prefill[0][1] if self.step_times.prefill else 0.0
        layer_s = step_s / self._num_layers
        spec = self._groups[group]
        between = self._num_layers / spec.num_layers  # layers of the model from one of the group to its next
        behind = self._num_layers - 1 - spec.layers[-1]
        return self._connector.layers_per_write(
            decode_engine,
            group,
            num_blocks * spec.bytes_per_block // spec.num_layers,
            layer_s * between,
            max(0.0, step_s - launch_s) / spec.num_layers,
            layer_s * (behind + self._share_after_attention(num_tokens)),
        )
