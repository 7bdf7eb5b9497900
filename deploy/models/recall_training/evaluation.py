"""The accuracy of a model on fresh lists, by `generate` of transformers."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from recall_training.batches import ANSWER_TOKENS
from recall_training.samples import Sample, make_samples
from recall_training.tokenizer import EOS, PAD, check_tokenizer


@dataclass(frozen=True)
class Score:
    """How many prompts of a kind were answered exactly."""

    exact: int
    prompts: int
    accuracy: float


def chunks(samples: Sequence[Sample], size: int) -> Iterator[Sequence[Sample]]:
    """Yield the samples in runs of at most ``size``."""
    for start in range(0, len(samples), size):
        yield samples[start : start + size]


@torch.no_grad()
def score(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, samples: Sequence[Sample]) -> Score:
    """Count the samples whose greedy answer is the number, then the end, and nothing else."""
    tokenizer.padding_side = "left"
    exact = 0
    for chunk in chunks(samples, 50):
        inputs = tokenizer([sample.prompt for sample in chunk], return_tensors="pt", padding=True)
        output = model.generate(
            input_ids=inputs["input_ids"].to(model.device),
            attention_mask=inputs["attention_mask"].to(model.device),
            do_sample=False,
            max_new_tokens=ANSWER_TOKENS + 2,
        )
        for sample, ids in zip(chunk, output[:, inputs["input_ids"].shape[1] :], strict=True):
            text = tokenizer.decode(ids, skip_special_tokens=False)
            exact += text.replace(PAD, "") == f" {sample.answer}{EOS}"
    return Score(exact, len(samples), round(exact / len(samples), 5))


def evaluate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: int, seed: int) -> dict[str, Score]:
    """Measure and print the accuracy on fresh lists of several lengths."""
    check_tokenizer(tokenizer)
    rng = random.Random(f"recall evaluation {seed}")
    scores: dict[str, Score] = {}
    for label, entries in (("1", 1), ("8", 8), ("32", 32), ("64", 64), ("1..64", None)):
        scores[label] = score(model, tokenizer, make_samples(rng, prompts, entries))
        result = scores[label]
        print(
            f"lists of {label:>5}: {result.exact} of {result.prompts} exact ({100 * result.accuracy:.2f} %)",
            flush=True,
        )
    return scores
