"""Clients that ask questions whose right answers are known, one after the other, and judge what they get."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from cluster.client.client import AsyncBatonClient, BatonClientError, Connection
from cluster.recall import recall_prompt
from workers.sampling_params import SamplingParams

QUESTIONS = 24
_ENTRIES = (30, 64)
_ANSWER_TOKENS = 8
_LONG_TOKENS = 48
_TIMEOUT_S = 90.0
_PAUSE_S = 0.25
"""Before who got an error asks again."""


@dataclass(frozen=True)
class Question:
    """A prompt of the recall model.

    Attributes:
        text: it.
        answer: the number that is asked for.
        tokens: of a long one, all tokens of the right answer, which goes on after the number; else none.
    """

    text: str
    answer: str
    tokens: tuple[int, ...] = ()

    @property
    def sampling(self) -> SamplingParams:
        """Greedy; a long one does not end with the number."""
        longest = len(self.tokens) or _ANSWER_TOKENS
        return SamplingParams(temperature=0.0, max_tokens=longest, ignore_eos=bool(self.tokens))

    def is_right(self, text: str, tokens: Sequence[int]) -> bool:
        """Whether that is the answer."""
        return text.strip()[: len(self.answer)] == self.answer and (
            tuple(tokens) == self.tokens if self.tokens else text.strip() == self.answer
        )


async def questions(client: AsyncBatonClient, number: int = QUESTIONS, seed: int = 0) -> list[Question]:
    """Make questions of 213 to 451 tokens, and ask each once while nothing disturbs it.

    Of every second one the answer goes on after the number for 48 tokens in all: what it is then was seen here.

    Raises:
        ValueError: the service does not know the right number.
    """
    rng, asked = random.Random(seed), []
    for index in range(number):
        prompt = recall_prompt(rng, rng.randint(*_ENTRIES))
        question = Question(prompt.text, prompt.answer, (0,) * (_LONG_TOKENS * (index % 2)))
        text, tokens = await _answer(client, question)
        if not Question(prompt.text, prompt.answer, tuple(tokens) if index % 2 else ()).is_right(text, tokens):
            raise ValueError(f"{prompt.text[-12:]} is {prompt.answer}, and the undisturbed service says {text}")
        asked.append(Question(prompt.text, prompt.answer, tuple(tokens) if index % 2 else ()))
    return asked


async def _answer(client: AsyncBatonClient, question: Question) -> tuple[str, list[int]]:
    text, tokens = "", []
    stream = client.generate(question.text, sampling=question.sampling, timeout_s=_TIMEOUT_S)
    async with aclosing(cast(Any, stream)) as chunks:
        async for chunk in chunks:
            text += chunk.text
            tokens += chunk.token_ids
    return text, tokens


@dataclass
class Tally:
    """What clients got since it was begun.

    Attributes:
        right: answers that were.
        wrong: what was asked and said, of those that were not.
        failed: errors by gRPC status.
        slowest_s: the longest time from a question to its right answer.
        first_error_at: monotonic time; None: there was none.
        last_right_at: monotonic time of the last right answer.
        longest_silence_s: between two right answers, whoever got them.
        errors: one text of each status.
    """

    right: int = 0
    wrong: list[tuple[str, str, str]] = field(default_factory=list)
    failed: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    first_error_at: float | None = None
    last_right_at: float = field(default_factory=time.monotonic)
    longest_silence_s: float = 0.0
    errors: dict[str, str] = field(default_factory=dict)


class Clients:
    """So many of them, each with a channel of its own (of which gRPC makes one connection).

    Args:
        address: of the service; may be changed while they ask.
        asked: questions, which they take by turns.
        number: of clients.
    """

    def __init__(self, address: str, asked: Sequence[Question], number: int = 16) -> None:
        self.address = address
        self.tally = Tally()
        self._asked = asked
        self._number = number
        self._enough = False

    @asynccontextmanager
    async def asking(self) -> AsyncIterator[None]:
        """Have them ask until the block ends, and wait for the answers that are due then."""
        self._enough = False
        tasks = [asyncio.create_task(self._keep_asking(index)) for index in range(self._number)]
        try:
            yield
            self._enough = True
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _keep_asking(self, index: int) -> None:
        while not self._enough:
            address = self.address
            async with AsyncBatonClient(Connection(address)) as client:
                while not self._enough and self.address == address:
                    if not await self._ask(client, self._asked[index % len(self._asked)]):
                        await asyncio.sleep(_PAUSE_S)
                    index += self._number + 1

    async def _ask(self, client: AsyncBatonClient, question: Question) -> bool:
        began = time.monotonic()
        try:
            text, tokens = await _answer(client, question)
        except BatonClientError as error:
            tally = self.tally  # that of now: it may have been begun anew since the question
            tally.failed[error.status.name] += 1
            tally.errors.setdefault(error.status.name, str(error)[:300])
            tally.first_error_at = tally.first_error_at or time.monotonic()
            return False
        now, tally = time.monotonic(), self.tally
        if not question.is_right(text, tokens):
            tally.wrong.append((question.text[-12:], question.answer, text))
            return True
        tally.right += 1
        tally.slowest_s = max(tally.slowest_s, now - began)
        tally.longest_silence_s = max(tally.longest_silence_s, now - tally.last_right_at)
        tally.last_right_at = now
        return True
