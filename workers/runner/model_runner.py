"""Runs the model on a batch: from lists of token ids and blocks to logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from attention.kv_cache import layer_places
from workers.host_copies import to_device
from workers.models.causal_lm import CausalLM
from workers.runner.input_batch import Row, batch_inputs
from workers.runner.prefill_graphs import PrefillGraphs, Progress, ladder

__all__ = ["ModelRunner", "Row"]


class ModelRunner:
    """A model and its KV cache.

    Args:
        model: the decoder.
        kv_caches: of each of its cache groups, (layers of the group, num_blocks, *block).

    Attributes:
        groups: what each of these holds.
        places: for each layer of the model its group and its index there.
        block_size: tokens in the smallest blocks.

    Raises:
        ValueError: there is not one cache for each group.
    """

    def __init__(self, model: CausalLM, kv_caches: Sequence[torch.Tensor]) -> None:
        self.model = model
        self.groups = model.kv_cache_groups
        if len(kv_caches) != len(self.groups):
            raise ValueError(f"{len(kv_caches)} KV caches for {len(self.groups)} cache groups")
        self.kv_caches = tuple(kv_caches)
        self.places = layer_places(self.groups)
        self.block_size = min(group.block_size for group in self.groups)
        self.device = self.kv_caches[0].device
        self._block_sizes = [group.block_size for group in self.groups]
        self._prefill_graphs: PrefillGraphs | None = None

    @property
    def num_blocks(self) -> list[int]:
        """Of each group's cache."""
        return [kv_cache.shape[1] for kv_cache in self.kv_caches]

    def capture_prefill(self, longest: int, progress: Progress | None = None) -> None:
        """Capture short prompts as CUDA graphs, where there is a GPU and the attention backend can be replayed.

        Args:
            longest: tokens of the longest prompt that a batch may hold whole.
            progress: told how many lengths are captured, and how many there will be.
        """
        sizes = ladder(longest, self.model.max_model_len, self.model.has_experts)
        if self.device.type == "cuda" and self.model.prefills_in_graphs and sizes:
            self._prefill_graphs = PrefillGraphs(self.model, self.kv_caches, sizes, progress)

    @torch.inference_mode()
    def forward(
        self,
        rows: Sequence[Row],
        on_layer: Callable[[int], None] | None = None,
        on_hidden: Callable[[torch.Tensor], None] | None = None,
    ) -> torch.Tensor:
        """Compute a batch; its keys and values are in the cache afterwards. On a GPU it is queued: nothing here waits.

        Args:
            rows: the batch; every block of a row's tokens is in its block table.
            on_layer: called with each layer's number as soon as its keys and values are in the cache.
            on_hidden: called with what the model has made of all T tokens, (T, hidden size), for `compute_logits`.

        Returns:
            (N, vocab) float32, the logits after the last token of each row that wants them, in order.
        """
        if on_hidden is None and self._prefill_graphs is not None and self._prefill_graphs.fits(rows):
            return self._prefill_graphs.run(rows[0], on_layer)
        inputs = batch_inputs(rows, self._block_sizes, self.device)
        hidden = self.model(inputs.input_ids, inputs.positions, self.kv_caches, inputs.metadata, on_layer)
        if on_hidden is not None:
            on_hidden(hidden)
        if inputs.wanted is not None:
            hidden = hidden[inputs.wanted]
        logits: torch.Tensor = self.model.compute_logits(hidden)
        return logits

    def ready_event(self) -> torch.cuda.Event | None:
        """An event after everything queued on the device so far; None where nothing is queued."""
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    @torch.inference_mode()
    def read_blocks(self, blocks: Sequence[int], group: int = 0) -> torch.Tensor:
        """Copy blocks of all layers of a group to host memory: (layers, len(blocks), *block), FP8 as bytes.

        Comes after everything queued on the device, and is done on return: from then on the blocks may be given to
        somebody who writes to them from elsewhere.
        """
        index = to_device(torch.tensor(blocks), self.device)
        on_gpu = self.device.type == "cuda"
        layers = indexable(self.kv_caches[group])
        shape = (layers.shape[0], len(blocks), *layers.shape[2:])
        data = torch.empty(shape, dtype=layers.dtype, pin_memory=on_gpu)
        for layer, copy in zip(layers, data, strict=True):  # one by one: what is gathered takes little memory
            copy.copy_(layer[index], non_blocking=True)
        if on_gpu:
            torch.cuda.current_stream(self.device).synchronize()
        return data

    @torch.inference_mode()
    def write_blocks(self, blocks: Sequence[int], data: torch.Tensor, group: int = 0) -> None:
        """Copy what `read_blocks` returned into these blocks, before whatever is queued on the device from now on."""
        index = to_device(torch.tensor(blocks), self.device)
        for layer, copy in zip(indexable(self.kv_caches[group]), data, strict=True):
            layer[index] = copy.to(self.device, non_blocking=True)

    @torch.inference_mode()
    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int], group: int = 0) -> None:
        """Copy blocks of a group into others, before whatever is queued on the device from now on; no waiting."""
        pairs = to_device(torch.tensor([list(sources), list(targets)]), self.device)
        for layer in indexable(self.kv_caches[group]):
            layer[pairs[1]] = layer[pairs[0]]


def indexable(kv_cache: torch.Tensor) -> torch.Tensor:
    """An FP8 cache as bytes, which can be indexed; any other as it is."""
    return kv_cache.view(torch.uint8) if kv_cache.dtype.itemsize == 1 else kv_cache
