"""One question of a storm, and what became of it."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from statistics import quantiles
from typing import Any, cast
from urllib.parse import urlsplit

from cluster.client.client import AsyncBatonClient, BatonClientError
from cluster.recall import RecallPrompt, recall_prompt
from workers.sampling_params import SamplingParams

_ENTRIES = (4, 24)
_ANSWER_TOKENS = 8
_WITHOUT_END = 400
_UNHURRIED_S = 1800.0
"""A deadline that nobody is refused for who would wait behind a thousand others."""


@dataclass
class Outcomes:
    """What clients got.

    Attributes:
        right: answers that were.
        wrong: what was asked and said, of those that were not.
        failed: errors by status.
        left: clients that left before the end, by whether they had had a token.
        seconds: of each right answer, from the question on.
        first_s: of those that were streamed, to the first token.
        errors: one text of each status.
    """

    right: int = 0
    wrong: list[tuple[str, str, str]] = field(default_factory=list)
    failed: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)

    def judge(self, prompt: RecallPrompt, text: str, began: float) -> None:
        """An answer is whole."""
        if text.strip() != prompt.answer:
            self.wrong.append((prompt.text[-12:], prompt.answer, text))
            return
        self.right += 1
        self.seconds.append(time.monotonic() - began)

    def fail(self, status: str, text: str) -> None:
        """There was an error instead."""
        self.failed[status] += 1
        self.errors.setdefault(status, text[:300])

    def to_json(self) -> dict[str, Any]:
        """In numbers."""
        return {
            "right": self.right,
            "wrong": len(self.wrong),
            "wrong_answers": self.wrong[:5],
            "failed": dict(self.failed),
            "errors": self.errors,
            "left": dict(self.left),
            "seconds": spread(self.seconds),
            "first_s": spread(self.first_s),
        }


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Median, 99th percentile and most."""
    if len(values) < 2:
        return None
    cut = quantiles(values, n=100)
    return {"p50": cut[49], "p99": cut[98], "max": max(values)}


def prompt(rng: random.Random) -> RecallPrompt:
    """A list of 31 to 171 tokens, and a question about it."""
    return recall_prompt(rng, rng.randint(*_ENTRIES))


async def stream(client: AsyncBatonClient, asked: RecallPrompt, outcomes: Outcomes, timeout_s: float = 120.0) -> None:
    """Ask, and read the answer as it comes."""
    began, text = time.monotonic(), ""
    sampling = SamplingParams(temperature=0.0, max_tokens=_ANSWER_TOKENS)
    answer = client.generate(asked.text, sampling=sampling, timeout_s=timeout_s)
    try:
        async with aclosing(cast(Any, answer)) as chunks:
            first_s = None
            async for chunk in chunks:
                first_s = time.monotonic() - began if first_s is None else first_s
                text += chunk.text
    except BatonClientError as error:
        outcomes.fail(error.status.name, str(error))
        return
    outcomes.first_s.append(first_s or 0.0)
    outcomes.judge(asked, text, began)


async def call(client: AsyncBatonClient, asked: RecallPrompt, outcomes: Outcomes, timeout_s: float = 120.0) -> None:
    """Ask for the answer in one piece."""
    began = time.monotonic()
    sampling = SamplingParams(temperature=0.0, max_tokens=_ANSWER_TOKENS)
    try:
        answer = await client.generate_once(asked.text, sampling=sampling, timeout_s=timeout_s)
    except BatonClientError as error:
        outcomes.fail(error.status.name, str(error))
        return
    outcomes.judge(asked, answer.text, began)


async def leave(client: AsyncBatonClient, asked: RecallPrompt, outcomes: Outcomes, at: asyncio.Event) -> None:
    """Ask for a text of hundreds of tokens, and go away at a moment, whatever has come of it."""
    sampling = SamplingParams(temperature=0.0, max_tokens=_WITHOUT_END, ignore_eos=True)
    answer = client.generate(asked.text, sampling=sampling, timeout_s=_UNHURRIED_S)
    had = "without a token"
    leaving = asyncio.create_task(at.wait())
    async with aclosing(cast(Any, answer)) as chunks:
        try:
            while True:
                next_one = asyncio.ensure_future(anext(chunks))
                await asyncio.wait({next_one, leaving}, return_when=asyncio.FIRST_COMPLETED)
                if not next_one.done():
                    next_one.cancel()
                    await asyncio.gather(next_one, return_exceptions=True)
                    outcomes.left[had] += 1
                    return
                next_one.result()
                had = "amid tokens"
        except StopAsyncIteration:
            outcomes.left["after the end"] += 1
        except BatonClientError as error:
            outcomes.fail(error.status.name, str(error))
        finally:
            leaving.cancel()


async def call_http(url: str, asked: RecallPrompt, outcomes: Outcomes) -> None:
    """Ask by HTTP, on a connection of its own."""
    began, where = time.monotonic(), urlsplit(url)
    body = json.dumps({"prompt": asked.text, "max_tokens": _ANSWER_TOKENS, "temperature": 0}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: {where.netloc}\r\nconnection: close\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    try:
        reader, writer = await asyncio.open_connection(where.hostname, where.port)
        writer.write(head.encode() + body)
        status, _, said = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
    except OSError as error:
        outcomes.fail("HTTP connection", str(error))
        return
    if b" 200 " not in status.split(b"\r\n", 1)[0]:
        outcomes.fail(f"HTTP {status.split()[1].decode()}", said.decode(errors="replace"))
        return
    outcomes.judge(asked, json.loads(said[said.index(b"{") : said.rindex(b"}") + 1])["choices"][0]["text"], began)
