"""How many answers a damaged cache spoils."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast

from recall_training.batches import ANSWER_TOKENS, ENTRY_TOKENS
from recall_training.samples import MAX_ENTRIES, make_samples
from recall_training.tokenizer import EOS, encode


@torch.no_grad()
def report_damage(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    """Measure and print how many answers go wrong where a part of the cache belongs to another list.

    All 64 entries of one list are asked about.  The prompts run whole; then a part of the cache is
    replaced by that of another list (a page of 16 tokens in every layer, or the whole list in one
    layer), and the answers are decoded from it.
    """
    rng = random.Random(f"recall damage {seed}")
    space = encode(tokenizer, " ")
    numbers: list[str] = []
    caches: list[list[tuple[Tensor, Tensor]]] = []
    for sample in make_samples(rng, 2, MAX_ENTRIES):
        listing = sample.prompt.split("; ")[0]
        entries = [entry.split() for entry in listing.split(", ")]
        prompts = [f"{listing}; {name}?" for name, _ in entries]
        ids = tokenizer(prompts, return_tensors="pt")["input_ids"].to(model.device)
        cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        caches.append([(layer.keys, layer.values) for layer in cache.layers])
        numbers = numbers or [number for _, number in entries]
    right, wrong = caches

    def wrong_answers(tokens: slice, layers: Sequence[int]) -> int:
        """Return how many of the 64 answers are wrong with these tokens from the other list."""
        cache = DynamicCache()
        for layer, (pair, other) in enumerate(zip(right, wrong, strict=True)):
            keys, values = (tensor.clone() for tensor in pair)
            if layer in layers:
                keys[:, :, tokens] = other[0][:, :, tokens]
                values[:, :, tokens] = other[1][:, :, tokens]
            cache.update(keys, values, layer)
        answer = torch.tensor([space] * len(numbers), device=model.device)
        while answer.shape[1] < ANSWER_TOKENS:
            output = model(input_ids=answer[:, -1:], past_key_values=cache, use_cache=True)
            answer = torch.cat([answer, output.logits[:, -1:].argmax(-1)], dim=1)
        texts = tokenizer.batch_decode(answer)
        return sum(text != f" {number}{EOS}" for text, number in zip(texts, numbers, strict=True))

    every = range(len(right))
    end = 1 + ENTRY_TOKENS * MAX_ENTRIES
    report = {
        "nothing": wrong_answers(slice(0, 0), every),
        "one page of 16 tokens, by page": [
            wrong_answers(slice(start, start + 16), every) for start in range(0, end - 15, 16)
        ],
        "the list in one layer, by layer": [wrong_answers(slice(1, end), [layer]) for layer in every],
        "the list in every layer": wrong_answers(slice(1, end), every),
    }
    for label, wrongs in report.items():
        print(f"wrong of {len(numbers)}, replaced: {label}: {wrongs}", flush=True)
