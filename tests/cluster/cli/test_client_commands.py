"""`baton generate` and `baton status` against a real server."""

import asyncio
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.api import PoolTarget
from cluster.cli.main import main
from cluster.version import version
from workers.errors import HandoffError
from workers.messages import FinishReason
from workers.sampling_params import SamplingParams

ROOT = Path(__file__).parents[3]
Serve = Callable[..., Awaitable]
Answer = Callable[..., list]


async def baton(*arguments: str) -> int:
    return await asyncio.to_thread(main, arguments)


async def test_generate_prints_the_answer(serve: Serve, answer: Answer, capsys: pytest.CaptureFixture[str]) -> None:
    served = await serve(answer("héllo", FinishReason.STOP))
    assert await baton("generate", "ping", "--server", served.server.address) == 0
    assert capsys.readouterr().out == "héllo\n"
    assert served.tokenizer.decode(served.engine.requests[0].prompt_token_ids) == "ping"


async def test_generate_sends_every_sampling_flag(serve: Serve, answer: Answer) -> None:
    served = await serve(answer("a"))
    flags = (
        "--max-tokens 9 --min-tokens 2 --temperature 0.5 --top-p 0.9 --top-k 4 --min-p 0.1 --seed 7 "
        "--presence-penalty 1 --frequency-penalty -1 --repetition-penalty 1.5 "
        "--stop END --stop . --ignore-eos --logprobs 3 --n 1 --prompt-logprobs 0"
    )
    assert await baton("generate", "x", "--server", served.server.address, *flags.split()) == 0
    assert served.engine.requests[0].sampling == SamplingParams(
        max_tokens=9, min_tokens=2, temperature=0.5, top_p=0.9, top_k=4, min_p=0.1, seed=7, presence_penalty=1.0,
        frequency_penalty=-1.0, repetition_penalty=1.5, stop=("END", "."), ignore_eos=True, logprobs=3,
        n=1, prompt_logprobs=0,
    )  # fmt: skip


async def test_generate_prints_json_and_stats(serve: Serve, answer: Answer, capsys: pytest.CaptureFixture[str]) -> None:
    served = await serve(answer("hello", chunk=2))
    assert await baton("generate", "ping", "--json", "--stats", "--server", served.server.address) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert (result["text"], result["finish_reason"]) == ("hello", "length")
    assert result["token_ids"] == served.tokenizer.encode("hello")
    assert result["usage"] == {"prompt_tokens": 4, "completion_tokens": 5}
    assert result["timings"]["hidden_fraction"] == pytest.approx(0.75)
    assert "4 prompt tokens, 5 generated" in err
    assert "75% of it hidden" in err
    assert "p-1 → d-1" in err


async def test_generate_reads_standard_input_and_chats(
    serve: Serve, answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = await serve(answer("a"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("two\nlines é\n".encode())))
    assert await baton("generate", "-", "--chat", "--server", served.server.address) == 0
    assert served.tokenizer.decode(served.engine.requests[0].prompt_token_ids) == "[user]two\nlines é[assistant]"


async def test_standard_input_that_is_not_utf8_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ok \xff")))
    assert await baton("generate", "-") == 1
    assert capsys.readouterr().err == "baton generate: standard input is not UTF-8: byte 3 is wrong\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("",), "INVALID_ARGUMENT: the prompt is empty"),
        (("x" * 64,), "INVALID_ARGUMENT: the prompt has 64 tokens"),
        (("x", "--temperature", "-1"), "temperature is -1.0, it must be in [0.0, 100.0]"),
        (("x", "--timeout", "0"), "--timeout is 0, it must be more than 0"),
        (("\udcff",), "the request cannot be sent"),
    ],
)
async def test_a_users_mistake_is_one_line(
    serve: Serve, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    served = await serve([])
    assert await baton("generate", *arguments, "--server", served.server.address) == 1
    out, err = capsys.readouterr()
    assert err.startswith("baton generate: ")
    assert message in err
    assert err.count("\n") == 1
    assert out == ""


async def test_an_answer_that_breaks_off_fails(
    serve: Serve, answer: Answer, capsys: pytest.CaptureFixture[str]
) -> None:
    served = await serve([answer("ab")[0], HandoffError("the KV cache did not arrive")])
    assert await baton("generate", "x", "--server", served.server.address) == 1
    out, err = capsys.readouterr()
    assert out == "a\n"
    assert err == "baton generate: UNAVAILABLE: the KV cache did not arrive\n"


@pytest.mark.parametrize("command", [("generate", "x"), ("status",)])
async def test_no_server_is_one_line_that_says_what_to_check(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert await baton(*command, "--server", "127.0.0.1:1") == 1
    err = capsys.readouterr().err
    assert "cannot reach a Baton server at 127.0.0.1:1" in err
    assert "baton up" in err
    assert err.count("\n") == 1


async def test_the_token_comes_from_flag_or_environment(
    serve: Serve, answer: Answer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    served = await serve(answer("a"), auth_token="s3cret")
    monkeypatch.delenv("BATON_TOKEN", raising=False)
    assert await baton("status", "--server", served.server.address) == 1
    assert "UNAUTHENTICATED: the call carries no bearer token" in capsys.readouterr().err
    assert await baton("status", "--server", served.server.address, "--token", "s3cret") == 0
    monkeypatch.setenv("BATON_TOKEN", "s3cret")
    assert await baton("status", "--server", served.server.address) == 0


async def test_status_shows_workers(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    served = await serve([])
    monkeypatch.setenv("COLUMNS", "200")
    assert await baton("status", "--server", served.server.address) == 0
    text = capsys.readouterr().out
    for word in ("tiny", "p-1", "d-1", "ready", "draining", "FLASHINFER", "77"):
        assert word in text
    assert "prefill pool: 1 of 1 workers ready, 90 of 100 blocks free" in text
    assert "decode pool: 0 of 1 workers ready, 150 of 200 blocks free" in text
    assert re.search(rf"^baton {re.escape(version())}.* up for \d+ s$", text, re.MULTILINE)


async def test_status_as_json(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    served = await serve([])
    assert await baton("status", "--json", "--server", served.server.address) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["model"]["name"] == "tiny"
    assert result["model"]["eos_token_ids"] == [256]
    assert [worker["engine_id"] for worker in result["workers"]] == ["p-1", "d-1"]
    assert result["workers"][0]["load"]["reserved_blocks"] == 5


async def test_a_reader_that_goes_away_is_no_traceback(serve: Serve, answer: Answer) -> None:
    served = await serve(answer("hello"))
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "cluster.cli.main", "generate", "x", "--server", served.server.address]
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    _, err = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 141
    assert err == b""


@pytest.mark.parametrize("what", [("abc",), ("--prompt-tokens", "3")])
async def test_explain_shows_every_pair(
    serve: Serve, what: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    served = await serve([])
    monkeypatch.setenv("COLUMNS", "200")
    assert await baton("explain", *what, "--max-tokens", "5", "--server", served.server.address) == 0
    assert len(served.engine.requests[0].prompt_token_ids) == 3
    title, _, best, alone, other = capsys.readouterr().out.splitlines()
    assert title == "3 prompt tokens, at most 5 to generate"
    assert best.split() == ["→", "p-1", "d-2", "12.3", "2.1", "4.5", "0.0", "300.0", "64", "32"]
    assert alone.split()[:5] == ["on", "the", "decode", "worker", "d-2"]
    assert alone.split()[5:] == ["15.1", "0.0", "4.5", "100.0", "410.0", "32", "32"]
    assert "d-1.00: its batch is full" in other


async def test_explain_as_json(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    served = await serve([])
    assert await baton("explain", "abc", "--json", "--server", served.server.address) == 0
    result = json.loads(capsys.readouterr().out)
    assert [(pair["prefill"], pair["chosen"]) for pair in result["pairs"]] == [
        ("p-1.00", True),
        (None, False),
        ("p-1.00", False),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give either a prompt or --prompt-tokens"),
        (("x", "--prompt-tokens", "3"), "give either a prompt or --prompt-tokens"),
        (("--prompt-tokens", "0"), "--prompt-tokens is 0, it must be at least 1"),
        (("--prompt-tokens", "64"), "INVALID_ARGUMENT: the prompt has 64 tokens"),
    ],
)
async def test_explain_refuses(
    serve: Serve, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    served = await serve([])
    assert await baton("explain", *arguments, "--server", served.server.address) == 1
    assert message in capsys.readouterr().err


async def test_scale_says_what_the_pools_are_to_have(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    served = await serve([])
    assert await baton("scale", "prefill=2", "decode=3", "--server", served.server.address) == 0
    assert served.engine.targets == {"prefill": 2, "decode": 3}
    assert capsys.readouterr().out == "prefill: 2 workers (from 1 to 4)\ndecode: 3 workers (from 1 to 4)\n"
    assert await baton("scale", "--json", "--server", served.server.address) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown[1] == {"role": "decode", "target": 3, "min_replicas": 1, "max_replicas": 4, "group": ""}


async def test_scale_and_status_show_each_group(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    served = await serve([])
    asked: list[dict[str, int]] = []

    def scale(targets: Mapping[str, int]) -> list[PoolTarget]:
        asked.append(dict(targets))
        return [
            PoolTarget("prefill", 1, 1, 4),
            PoolTarget("decode", 2, 0, 3, "h100"),
            PoolTarget("decode", 1, 1, 1, "cpu"),
        ]

    prefill, decode = served.engine.workers()
    served.engine.scale = scale
    served.engine.workers = lambda: [
        prefill,
        replace(decode, group="h100"),
        replace(decode, group="cpu", state="ready"),
    ]
    assert await baton("scale", "decode.h100=2", "--server", served.server.address) == 0
    assert asked == [{"decode.h100": 2}]
    assert capsys.readouterr().out.splitlines() == [
        "prefill: 1 workers (from 1 to 4)",
        "decode.h100: 2 workers (from 0 to 3)",
        "decode.cpu: 1 workers (from 1 to 1)",
    ]
    monkeypatch.setenv("COLUMNS", "200")
    assert await baton("status", "--server", served.server.address) == 0
    assert capsys.readouterr().out.splitlines()[-4:] == [
        "prefill pool: 1 of 1 workers ready, 90 of 100 blocks free, 77 prompt tokens waiting",
        "decode pool: 1 of 2 workers ready, 300 of 400 blocks free, 0 prompt tokens waiting",
        "  h100: 0 of 1 workers ready, 150 of 200 blocks free, 0 prompt tokens waiting",
        "  cpu: 1 of 1 workers ready, 150 of 200 blocks free, 0 prompt tokens waiting",
    ]
    served.engine.workers = lambda: [decode]
    assert await baton("status", "--server", served.server.address) == 0
    assert "prefill pool: no workers\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("decode",), "'decode' must be POOL=N or POOL.GROUP=N, such as decode=3"),
        (("decode=two",), "'decode=two' must be POOL=N"),
        (("decode=1", "decode=2"), "decode is given twice"),
        (("decode=9999999999",), "the request cannot be sent"),
        (("decode=5",), "INVALID_ARGUMENT: decode is 5, it must be in [1, 4]"),
    ],
)
async def test_a_wrong_target_is_one_line(
    serve: Serve, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    served = await serve([])
    assert await baton("scale", *arguments, "--server", served.server.address) == 1
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert served.engine.targets == {"prefill": 1, "decode": 1}
