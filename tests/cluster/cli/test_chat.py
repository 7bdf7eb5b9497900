"""`baton chat` against a real server: turns, what Ctrl-C ends, what is said of what goes wrong."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from cluster.cli.chat.conversation import Conversation
from cluster.cli.main import main
from workers.errors import HandoffError
from workers.messages import FinishReason

ROOT = Path(__file__).parents[3]
Serve = Callable[..., Awaitable]
Answer = Callable[..., list]


async def chat(monkeypatch: pytest.MonkeyPatch, lines: str | bytes, *arguments: str) -> int:
    """The command with these lines piped in."""
    raw = lines.encode() if isinstance(lines, str) else lines
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8"))
    return await asyncio.to_thread(main, ["chat", *arguments])


def prompts(served) -> list[str]:
    return [served.tokenizer.decode(request.prompt_token_ids) for request in served.engine.requests]


async def test_turns_are_remembered_until_they_are_forgotten(
    serve: Serve, answer: Answer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    served = await serve(answer("ok", FinishReason.STOP))
    lines = "hi\n\n yo \n/reset\nhm\n/system S\nah\n/exit\nnever\n"
    assert await chat(monkeypatch, lines, "--server", served.server.address, "--max-tokens", "4") == 0
    assert prompts(served) == [
        "[user]hi[assistant]",
        "[user]hi[assistant]ok[user]yo[assistant]",
        "[user]hm[assistant]",
        "[system]S[user]ah[assistant]",
    ]
    assert capsys.readouterr().out == "ok\n" * 4
    assert {request.sampling.max_tokens for request in served.engine.requests} == {4}


async def test_the_system_prompt_and_sampling_are_sent(
    serve: Serve, answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = await serve(answer("ok"))
    flags = "--system Be. --temperature 0.5 --top-p 0.9 --seed 7 --stop END --user eve"
    assert await chat(monkeypatch, "hi", "--server", served.server.address, *flags.split()) == 0
    assert prompts(served) == ["[system]Be.[user]hi[assistant]"]
    (request,) = served.engine.requests
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.seed, sampling.stop) == (0.5, 0.9, 7, ("END",))
    assert request.user == "eve"


async def test_the_oldest_questions_are_left_out_when_the_window_is_full(
    serve: Serve, answer: Answer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The window has 64 tokens, of which half are kept for the answer; a character is a token."""
    served = await serve(answer("ok"))
    assert await chat(monkeypatch, "one\ntwo\nsix", "--server", served.server.address, "--system", "s") == 0
    assert prompts(served)[-1] == "[system]s[user]six[assistant]"
    assert "the oldest 2 questions are left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lines", "arguments", "message"),
    [
        ("hi", ("--timeout", "0"), "--timeout is 0, it must be more than 0"),
        ("hi", ("--temperature", "-1"), "temperature is -1.0"),
        ("hi", ("--set", "server.port=1"), "--set is of the service that --model starts"),
        ("/restart\nhi", (), "there is no /restart; there are /reset"),
        (b"\xff\n", (), "standard input is not UTF-8"),
        ("x" * 64, (), "INVALID_ARGUMENT: the prompt"),
    ],
)
async def test_a_mistake_ends_a_piped_conversation(
    serve: Serve,
    answer: Answer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    lines: str | bytes,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    served = await serve(answer("ok"))
    assert await chat(monkeypatch, lines, "--server", served.server.address, *arguments) == 1
    err = capsys.readouterr().err
    assert message in err
    assert err.splitlines()[-1].startswith("baton chat: ")


async def test_a_failing_answer_ends_a_piped_conversation(
    serve: Serve, answer: Answer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    served = await serve([answer("ab")[0], HandoffError("the KV cache did not arrive")])
    assert await chat(monkeypatch, "hi\nyo", "--server", served.server.address) == 1
    assert len(served.engine.requests) == 1
    assert "the KV cache did not arrive" in capsys.readouterr().err


async def test_ctrl_c_cancels_the_answer_and_not_the_conversation(serve: Serve, answer: Answer) -> None:
    """At a pseudo-terminal, with what had come of the answer kept; and at the prompt it ends nothing either."""
    served = await serve([*answer("abc")[:2], asyncio.Event()])
    terminal, line = os.openpty()
    program = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "cluster.cli.main", "chat", "--server", served.server.address, "--max-tokens", "4",
        cwd=ROOT, stdin=line, stdout=line, stderr=line,
    )  # fmt: skip
    os.close(line)
    shown = ""

    async def until(text: str) -> None:
        nonlocal shown
        while text not in shown:
            read = await asyncio.wait_for(asyncio.to_thread(os.read, terminal, 4096), 60)
            shown += read.decode()
        shown = shown.partition(text)[2]

    await until(">>> ")
    os.write(terminal, b"hi\n")
    await until("ab")
    program.send_signal(signal.SIGINT)
    await until("(stopped)")
    await asyncio.wait_for(served.engine.closed.wait(), 10)
    await until(">>> ")
    program.send_signal(signal.SIGINT)
    await until("/exit ends the conversation")
    await until(">>> ")
    served.engine.script = answer("ok", FinishReason.STOP)
    os.write(terminal, b"yo\n")
    await until("ok")
    await until(">>> ")
    os.write(terminal, b"\x04")
    assert await asyncio.wait_for(program.wait(), 30) == 0
    os.close(terminal)
    assert prompts(served) == ["[user]hi[assistant]", "[user]hi[assistant]ab[user]yo[assistant]"]


def test_what_fits_begins_with_a_question_and_has_the_last() -> None:
    conversation = Conversation("s")
    for number in range(3):
        conversation.ask(f"q{number}")
        conversation.answer(f"a{number}")
    conversation.ask("q3")
    assert conversation.fitting(lambda messages: True) == (conversation.messages(), 0)
    messages, left_out = conversation.fitting(lambda messages: len(messages) <= 4)
    assert messages == [("system", "s"), ("user", "q2"), ("assistant", "a2"), ("user", "q3")]
    assert left_out == 2
    assert conversation.fitting(lambda messages: False) == ([("system", "s"), ("user", "q3")], 3)
    conversation.answer("")
    assert conversation.messages()[-1] == ("assistant", "a2")
