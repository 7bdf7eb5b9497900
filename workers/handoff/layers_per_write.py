"""How many layers of a prompt one WRITE carries: as configured, or as suits the prompt and the path."""

from __future__ import annotations

from collections.abc import Callable

from kv_transfer.connector import KVConnector
from workers.runner.step_times import StepTimes


class LayersPerWrite:
    """Chooses for every part of a handoff; the reasoning is `kv_transfer.link_cost.layers_per_write`'s.

    Attributes:
        capability: the worker's, once it is measured; without it compute is taken to hide nothing.

    Args:
        connector: knows what the path to each decode worker costs.
        num_layers: of the model.
        block_bytes: of one block in one layer.
        fixed: layers, whatever the prompt; None: choose.
        share_after_attention: of the time of a layer, given the tokens of a step: what its MLP and output take.
    """

    def __init__(
        self,
        connector: KVConnector,
        num_layers: int,
        block_bytes: int,
        fixed: int | None,
        share_after_attention: Callable[[int], float],
    ) -> None:
        self.capability = StepTimes()
        self._connector = connector
        self._num_layers = num_layers
        self._block_bytes = block_bytes
        self._fixed = fixed
        self._share_after_attention = share_after_attention

    def choose(self, decode_engine: str, num_blocks: int, num_tokens: int) -> int:
        """Layers in a WRITE to this engine.

        The shortest prompt that was measured takes as long as launching its kernels does; what a longer one takes
        beyond that, the launching thread is idle.

        Args:
            decode_engine: where the blocks go.
            num_blocks: that a step completes of the prompt.
            num_tokens: that the step computes, of all prompts in it.
        """
        if self._fixed is not None:
            return self._fixed
        step_s = self.capability.prefill_seconds(num_tokens)
        launch_s = self.capability.prefill[0][1] if self.capability.prefill else 0.0
        layer_s = step_s / self._num_layers
        return self._connector.layers_per_write(
            decode_engine,
            0,  # the cache is one group
            num_blocks * self._block_bytes,
            layer_s,
            max(0.0, step_s - launch_s) / self._num_layers,
            layer_s * self._share_after_attention(num_tokens),
        )
