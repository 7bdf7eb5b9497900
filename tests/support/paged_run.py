"""A decoder driven by hand."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from attention.metadata import build_metadata
from cache_groups import group_caches
from workers.models.causal_lm import CausalLM


class PagedRun:
    """Feeds sequences through a decoder over a KV cache whose blocks are shuffled and whose unused slots are NaN."""

    def __init__(self, decoder: CausalLM, num_sequences: int, max_tokens: int, seed: int = 0) -> None:
        self.decoder = decoder
        per_sequence = -(-max_tokens // decoder.block_size)
        blocks = list(range(num_sequences * per_sequence + 2))
        random.Random(seed).shuffle(blocks)
        self.caches = [cache.fill_(float("nan")) for cache in group_caches(decoder, len(blocks))]
        self.tables = [blocks[i * per_sequence : (i + 1) * per_sequence] for i in range(num_sequences)]
        self.lengths = [0] * num_sequences

    def step(self, tokens: dict[int, Sequence[int]], on_layer: Any = None) -> list[torch.Tensor]:
        """Append tokens to sequences, all in one batch; the logits of each of them, (n, vocab) per sequence."""
        ids, positions, contexts = [], [], []
        for i, new in tokens.items():
            ids += list(new)
            positions += range(self.lengths[i], self.lengths[i] + len(new))
            self.lengths[i] += len(new)
            contexts.append(self.lengths[i])
        query_lens = [len(new) for new in tokens.values()]
        device, tables = self.decoder.device, [self.tables[i] for i in tokens]
        metadata = build_metadata(query_lens, contexts, tables, self.decoder.block_size, device)
        with torch.inference_mode():
            inputs = torch.tensor([ids, positions], device=device)
            hidden = self.decoder(inputs[0], inputs[1], self.caches, [metadata] * len(self.caches), on_layer)
            logits = self.decoder.compute_logits(hidden)
        return list(logits.split(query_lens))

    def greedy(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
        """Prefill each prompt on its own, then decode all of them together."""
        outputs = [[int(self.step({i: prompt})[0][-1].argmax())] for i, prompt in enumerate(prompts)]
        for _ in range(num_tokens - 1):
            logits = self.step({i: output[-1:] for i, output in enumerate(outputs)})
            for output, row in zip(outputs, logits, strict=True):
                output.append(int(row[-1].argmax()))
        return outputs
