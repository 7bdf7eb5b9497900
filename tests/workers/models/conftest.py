"""A decoder driven by hand, and transformers beside it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from attention.metadata import build_metadata
from workers.models.decoder import Decoder


class PagedRun:
    """Feeds sequences through a decoder over a KV cache whose blocks are shuffled and whose unused slots are NaN."""

    def __init__(self, decoder: Decoder, num_sequences: int, max_tokens: int, seed: int = 0) -> None:
        self.decoder = decoder
        per_sequence = -(-max_tokens // decoder.block_size)
        blocks = list(range(num_sequences * per_sequence + 2))
        random.Random(seed).shuffle(blocks)
        self.cache = decoder.kv_cache_spec.allocate(len(blocks), "cpu").fill_(float("nan"))
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
        metadata = build_metadata(query_lens, contexts, [self.tables[i] for i in tokens], self.decoder.block_size)
        with torch.inference_mode():
            hidden = self.decoder(torch.tensor(ids), torch.tensor(positions), self.cache, metadata, on_layer)
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


class Reference:
    """The same checkpoint in transformers, float32."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        self.model.eval()

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = self.model(torch.tensor([list(ids)])).logits[0]
        return logits

    def greedy(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        ids = torch.tensor([list(prompt)])
        with torch.inference_mode():
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                do_sample=False,
                eos_token_id=None,
            )
        tokens: list[int] = out[0, len(prompt) :].tolist()
        return tokens


@pytest.fixture
def paged_run() -> type[PagedRun]:
    return PagedRun


@pytest.fixture
def reference() -> type[Reference]:
    return Reference
