"""Runs the model on a batch: from lists of token ids and blocks to logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from attention.metadata import build_metadata
from workers.models.decoder import Decoder


@dataclass(frozen=True)
class Row:
    """One sequence's share of a batch.

    Attributes:
        token_ids: tokens to compute.
        start: tokens of the sequence that are in the cache already.
        block_table: its blocks, in order.
        wants_logits: whether the logits after its last token are wanted.
    """

    token_ids: Sequence[int]
    start: int
    block_table: Sequence[int]
    wants_logits: bool = True


class ModelRunner:
    """A model and its KV cache.

    Args:
        model: the decoder.
        kv_cache: (num_layers, num_blocks, 2, block_size, Hkv, D).
    """

    def __init__(self, model: Decoder, kv_cache: torch.Tensor) -> None:
        self.model = model
        self.kv_cache = kv_cache
        self.block_size = kv_cache.shape[3]
        self.num_layers = kv_cache.shape[0]
        self.device = kv_cache.device

    @torch.inference_mode()
    def forward(self, rows: Sequence[Row], on_layer: Callable[[int], None] | None = None) -> torch.Tensor:
        """Compute a batch; its keys and values are in the cache afterwards.

        Args:
            rows: the batch; every block of a row's tokens is in its block table.
            on_layer: called with each layer's number as soon as its keys and values are in the cache.

        Returns:
            (N, vocab) float32, the logits after the last token of each row that wants them, in order.
        """
        query_lens = [len(row.token_ids) for row in rows]
        context_lens = [row.start + len(row.token_ids) for row in rows]
        metadata = build_metadata(
            query_lens, context_lens, [row.block_table for row in rows], self.block_size, self.device
        )
        input_ids = torch.tensor([token for row in rows for token in row.token_ids], device=self.device)
        positions = torch.tensor(
            [position for row, end in zip(rows, context_lens, strict=True) for position in range(row.start, end)],
            device=self.device,
        )
        hidden = self.model(input_ids, positions, self.kv_cache, metadata, on_layer)
        ends = [end for row, end in zip(rows, _ends(query_lens), strict=True) if row.wants_logits]
        if len(ends) < hidden.shape[0]:
            hidden = hidden[ends]
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
    def read_blocks(self, blocks: Sequence[int]) -> torch.Tensor:
        """Copy blocks of all layers to host memory: (num_layers, len(blocks), 2, block_size, Hkv, D)."""
        return self.kv_cache[:, list(blocks)].cpu()

    @torch.inference_mode()
    def write_blocks(self, blocks: Sequence[int], data: torch.Tensor) -> None:
        """Copy what `read_blocks` returned into these blocks."""
        self.kv_cache[:, list(blocks)] = data.to(self.device)


def _ends(lengths: Sequence[int]) -> list[int]:
    """The place of each row's last token in the packed batch."""
    ends, total = [], 0
    for length in lengths:
        total += length
        ends.append(total - 1)
    return ends
