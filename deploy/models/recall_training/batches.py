"""Batches: lists and questions as token ids, made on the training device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from recall_training.samples import DIGITS_PER_NUMBER, NAMES
from recall_training.tokenizer import encode

ENTRY_TOKENS = 7  # name, space, four digits, comma or semicolon
QUERY_TOKENS = 8  # name, question mark, space, four digits, end of sequence
ANSWER_TOKENS = 6  # the last six of a query: what the model has to say


@dataclass(frozen=True)
class Batch:
    """Lists of equal length, each followed by several queries.

    ``mask`` and ``positions`` are None for plain causal attention.  Otherwise ``mask`` is a boolean
    (1, 1, T, T) mask under which each query sees the list and itself alone, and ``positions`` put
    every query right behind the list: each is then exactly the prompt with one question, at a
    fraction of its cost.  The queries begin at token ``start``.
    """

    ids: Tensor
    positions: Tensor | None
    mask: Tensor | None
    start: int
    queries: int


class BatchMaker:
    """Makes batches of random lists and queries on a device."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, device: torch.device, seed: int) -> None:
        """Look up the token of each word once."""
        self.device = device
        self.generator = torch.Generator(device=device).manual_seed(seed)

        def single(text: str) -> int:
            (token,) = encode(tokenizer, text)
            return token

        def tokens(texts: Sequence[str]) -> Tensor:
            return torch.tensor([single(text) for text in texts], device=device)

        self.first_names = tokens(NAMES)
        self.names = tokens([f" {name}" for name in NAMES])
        self.digits = tokens([str(digit) for digit in range(10)])
        self.space, self.comma, self.semicolon, self.question = map(single, " ,;?")
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id

    def numbers(self, batch: int, entries: int) -> Tensor:
        """Return the tokens of random numbers, shaped (batch, entries, 4)."""
        shape = (batch, entries, DIGITS_PER_NUMBER)
        digits = torch.randint(10, shape, generator=self.generator, device=self.device)
        return self.digits[digits]

    def lists(self, batch: int, entries: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return (token ids of the lists, names, numbers) of random lists."""
        keys = torch.rand(batch, len(NAMES), generator=self.generator, device=self.device)
        names = keys.argsort(dim=1)[:, :entries]
        numbers = self.numbers(batch, entries)
        ids = torch.empty(batch, entries, ENTRY_TOKENS, dtype=torch.long, device=self.device)
        ids[:, :, 0] = self.names[names]
        ids[:, 0, 0] = self.first_names[names[:, 0]]
        ids[:, :, 1] = self.space
        ids[:, :, 2:6] = numbers
        ids[:, :, 6] = self.comma
        ids[:, -1, 6] = self.semicolon
        bos = torch.full((batch, 1), self.bos, device=self.device)
        return torch.cat([bos, ids.flatten(1)], dim=1), names, numbers

    def queries(self, names: Tensor, numbers: Tensor, asked: Tensor) -> Tensor:
        """Return the token ids of the queries for the entries ``asked``, answers included."""
        batch, count = asked.shape
        ids = torch.empty(batch, count, QUERY_TOKENS, dtype=torch.long, device=self.device)
        ids[:, :, 0] = self.names[names.gather(1, asked)]
        ids[:, :, 1] = self.question
        ids[:, :, 2] = self.space
        ids[:, :, 3:7] = numbers.gather(1, asked[:, :, None].expand(-1, -1, DIGITS_PER_NUMBER))
        ids[:, :, 7] = self.eos
        return ids.flatten(1)

    def separate(self, batch: int, entries: int, count: int) -> Batch:
        """Return lists with ``count`` different queries each that do not see one another."""
        listing, names, numbers = self.lists(batch, entries)
        keys = torch.rand(batch, entries, generator=self.generator, device=self.device)
        asked = keys.argsort(dim=1)[:, :count]
        ids = torch.cat([listing, self.queries(names, numbers, asked)], dim=1)
        start, length = listing.shape[1], ids.shape[1]
        index = torch.arange(length, device=self.device)
        block = torch.div(index - start, QUERY_TOKENS, rounding_mode="floor").clamp(min=-1)
        positions = torch.where(index < start, index, start + (index - start) % QUERY_TOKENS)
        mask = (index[:, None] >= index) & ((block == -1) | (block[:, None] == block))
        return Batch(ids, positions[None], mask[None, None], start, count)

    def dialogue(self, batch: int, entries: int, count: int) -> Batch:
        """Return lists with ``count`` queries one after the other, as in a chat of many turns."""
        listing, names, numbers = self.lists(batch, entries)
        asked = torch.randint(entries, (batch, count), generator=self.generator, device=self.device)
        ids = torch.cat([listing, self.queries(names, numbers, asked)], dim=1)
        return Batch(ids, None, None, listing.shape[1], count)
