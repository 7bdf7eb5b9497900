"""Runs the model on a batch: from lists of token ids and blocks to logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from attention.metadata import CommonAttentionMetadata, build_metadata
from workers.models.decoder import Decoder
from workers.pinned import to_device


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
        metadata = build_metadata(query_lens, context_lens, [row.block_table for row in rows], self.block_size)
        input_ids = torch.tensor([token for row in rows for token in row.token_ids])
        positions = torch.tensor(
            [position for row, end in zip(rows, context_lens, strict=True) for position in range(row.start, end)]
        )
        hidden = self.model(
            to_device(input_ids, self.device),
            to_device(positions, self.device),
            self.kv_cache,
            _moved(metadata, self.device),
            on_layer,
        )
        ends = [end for row, end in zip(rows, _ends(query_lens), strict=True) if row.wants_logits]
        if len(ends) < hidden.shape[0]:
            hidden = hidden[to_device(torch.tensor(ends, dtype=torch.int64), self.device)]
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
        """Copy blocks of all layers to host memory: (num_layers, len(blocks), 2, block_size, Hkv, D), FP8 as bytes.

        Comes after everything queued on the device, and is done on return: from then on the blocks may be given to
        somebody who writes to them from elsewhere.
        """
        index = to_device(torch.tensor(blocks), self.device)
        on_gpu = self.device.type == "cuda"
        shape = (self.num_layers, len(blocks), *self.kv_cache.shape[2:])
        layers = _indexable(self.kv_cache)
        data = torch.empty(shape, dtype=layers.dtype, pin_memory=on_gpu)
        for layer, copy in zip(layers, data, strict=True):  # one by one: what is gathered takes little memory
            copy.copy_(layer[index], non_blocking=True)
        if on_gpu:
            torch.cuda.current_stream(self.device).synchronize()
        return data

    @torch.inference_mode()
    def write_blocks(self, blocks: Sequence[int], data: torch.Tensor) -> None:
        """Copy what `read_blocks` returned into these blocks, before whatever is queued on the device from now on."""
        index = to_device(torch.tensor(blocks), self.device)
        for layer, copy in zip(_indexable(self.kv_cache), data, strict=True):
            layer[index] = copy.to(self.device, non_blocking=True)


def _indexable(kv_cache: torch.Tensor) -> torch.Tensor:
    """An FP8 cache as bytes, which can be indexed; any other as it is."""
    return kv_cache.view(torch.uint8) if kv_cache.dtype.itemsize == 1 else kv_cache


def _moved(metadata: CommonAttentionMetadata, device: torch.device) -> CommonAttentionMetadata:
    """A batch described on the host, on `device`."""
    if device.type == "cpu":
        return metadata
    return replace(
        metadata,
        cu_seqlens_q=to_device(metadata.cu_seqlens_q, device),
        seq_lens=to_device(metadata.seq_lens, device),
        block_tables=to_device(metadata.block_tables, device),
        slot_mapping=to_device(metadata.slot_mapping, device),
    )


def _ends(lengths: Sequence[int]) -> list[int]:
    """The place of each row's last token in the packed batch."""
    ends, total = [], 0
    for length in lengths:
        total += length
        ends.append(total - 1)
    return ends
