"""Work on requests is done off the event loop, and nobody's holds up another's."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from cluster import caller
from cluster.caller import Caller
from cluster.conversation.messages import ChatMessage
from cluster.generation.conversations import Conversation
from cluster.generation.intake import AT_ONCE_BYTES, LARGE_BYTES, Intake
from cluster.generation.text_generation import Generation
from cluster.text import chat_template
from cluster.text.chat_template import TimedMessages
from cluster.text.tokenizer import Tokenizer
from workers.errors import DeadlineExceededError, InvalidRequestError

PATIENCE_S = 30.0


def thread_name() -> str:
    return threading.current_thread().name


async def test_small_work_is_done_at_once_and_other_work_on_threads_of_its_size() -> None:
    intake = Intake()
    assert await intake.run(AT_ONCE_BYTES, thread_name) == thread_name()
    assert (await intake.run(AT_ONCE_BYTES + 1, thread_name)).startswith("intake-small")
    assert (await intake.run(LARGE_BYTES + 1, thread_name)).startswith("intake-large")
    with pytest.raises(InvalidRequestError, match="wrong"):
        await intake.call(LARGE_BYTES + 1, refuse, "wrong")


def refuse(why: str) -> None:
    raise InvalidRequestError(why)


async def test_work_that_takes_too_long_keeps_its_place_and_is_not_waited_for() -> None:
    intake, go_on = Intake(small_threads=1, limit_s=0.05), threading.Event()
    with pytest.raises(DeadlineExceededError, match=r"took longer than 0\.05 s"):
        await intake.run(AT_ONCE_BYTES + 1, lambda: go_on.wait(PATIENCE_S))
    waiting = asyncio.create_task(intake.run(AT_ONCE_BYTES + 1, thread_name))
    await asyncio.sleep(0.1)
    assert not waiting.done(), "who gives up and comes again does not get more"
    go_on.set()
    assert (await waiting).startswith("intake-small")


@pytest.fixture
def slow(byte_tokenizer: Tokenizer, monkeypatch) -> threading.Event:
    """Conversations that begin with `slow` are not written out before this is set."""
    go_on, write = threading.Event(), byte_tokenizer.apply_chat_template

    def apply_chat_template(messages, *args, **kwargs) -> str:
        if messages[0].content.startswith("slow"):
            go_on.wait(PATIENCE_S)
        return write(messages, *args, **kwargs)

    monkeypatch.setattr(byte_tokenizer, "apply_chat_template", apply_chat_template)
    yield go_on
    go_on.set()


async def test_long_conversations_of_one_client_hold_up_no_other_and_nothing_short(
    byte_tokenizer: Tokenizer, scripted: Callable, slow: threading.Event
) -> None:
    engine, model = scripted([])
    generation = Generation(engine, byte_tokenizer, model)

    async def tokenize(host: str, text: str) -> int:
        caller.accept(Caller(host))
        try:
            return len(await generation.tokenize(Conversation((ChatMessage("user", text),))))
        except InvalidRequestError:  # far too long for this model
            return -1

    long = "x" * (2 * LARGE_BYTES)
    held = [asyncio.create_task(tokenize("a", "slow" + long)) for _ in range(8)]
    await asyncio.sleep(0.05)
    async with asyncio.timeout(PATIENCE_S / 2):
        assert await tokenize("b", long) == -1
        assert await tokenize("a", "short") > 0
    assert not any(each.done() for each in held)
    slow.set()
    assert await asyncio.gather(*held) == [-1] * 8


def test_a_conversation_is_written_out_within_a_time(byte_tokenizer: Tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(chat_template, "RENDER_LIMIT_S", -1.0)
    with pytest.raises(InvalidRequestError, match="refuses these messages: it takes longer than the limit of -1 s"):
        byte_tokenizer.apply_chat_template((ChatMessage("user", "x"),))


def test_messages_with_a_time_are_a_list() -> None:
    messages = [{"role": "user"}, {"role": "assistant"}]
    timed = TimedMessages(messages, float("inf"))
    assert timed == messages == list(timed)
    assert timed[0] is messages[0]
    late = TimedMessages(messages, 0.0)[1:]
    with pytest.raises(TimeoutError):
        list(late)
