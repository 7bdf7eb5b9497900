"""What the Python clients take and send, and that they are light."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

from cluster.client import AsyncBatonClient, BatonClient, Connection
from cluster.client.requests import SamplingOptions, generate_request
from cluster.wire.sampling import sampling_from_proto
from workers.errors import ConfigError, InvalidRequestError
from workers.sampling_params import SamplingParams

ROOT = Path(__file__).parents[2]
LIGHT = (
    "cluster.client", "cluster.api", "cluster.errors", "cluster.wire.convert", "cluster.cli.main", "cluster.cli.up",
    "cluster.cli.generate", "cluster.cli.status", "cluster.cli.scale", "cluster.cli.explain", "cluster.cli.plan",
    "cluster.cli.serve", "benchmarks.bench", "cluster.generation.text_generation", "cluster.server.grpc.serve",
    "cluster.server.doors", "cluster.cli.chat.command",
)  # fmt: skip


def test_the_client_the_command_line_and_the_doors_load_neither_torch_nor_ray() -> None:
    heavy = ("torch", "ray", "transformers")
    code = f"import {', '.join(LIGHT)}, sys; print(*(name for name in {heavy} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


def test_the_client_and_its_commands_need_only_what_their_distribution_brings() -> None:
    client = ["cluster.client", "cluster.cli.top", *(name for name in LIGHT if name.startswith("cluster.cli."))]
    client.remove("cluster.cli.up")
    code = f"import {', '.join(client)}, sys; print(*({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    service = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    own = tomllib.loads((ROOT / "deploy/client/pyproject.toml").read_text())["project"]["dependencies"]
    names, brought = ({re.split(r"[<>=~\[ ]", each)[0] for each in listed} for listed in (service, own))
    lacking = {name.replace("-", "_") for name in names - brought}
    assert "numpy" in lacking
    assert lacking & set(done.stdout.split()) == set()


def sent(chat: object) -> list[tuple[str, str]]:
    request = generate_request(None, None, chat, None)  # type: ignore[arg-type]
    return [(message.role, message.content) for message in request.chat.messages]


def test_a_conversation_may_be_mappings_or_pairs() -> None:
    expected = [("system", "Be brief."), ("user", "Hi\nthere")]
    assert sent([("system", "Be brief."), ["user", "Hi\nthere"]]) == expected
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": "there"}]
    assert sent([{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]) == expected
    assert sent(({"content": "x", "role": "user", "name": None},)) == [("user", "x")]


@pytest.mark.parametrize(
    ("chat", "problem"),
    [
        ("hello", "chat is 'hello', expected a list"),
        ({"role": "user", "content": "x"}, "chat is {'role': 'user', 'content': 'x'}, expected a list"),
        (7, "chat is 7"),
        (["ab"], "chat message 0 is 'ab'"),
        ([("user", "x"), ("user",)], r"chat message 1 is \('user',\)"),
        ([{"role": "user"}], "chat message 0 has no 'content'"),
        ([{"role": "assistant", "tool_calls": []}], "chat message 0 has no 'content'"),
        (
            [{"role": "user", "content": "x", "tool_calls": [{}]}],
            "chat message 0.tool_calls is set in a message of role",
        ),
        ([{"content": "x"}], "chat message 0 has no 'role'"),
        ([{"role": "user", "content": "x", "contnet": "y"}], "chat message 0 has 'contnet', which cannot be sent"),
        ([("user", 7)], "the content of chat message 0 is 7"),
        ([(None, "x")], "the role of chat message 0 is None"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "content of chat message 0 has {'type': 'image_url'}"),
    ],
)
def test_what_is_no_conversation_is_refused_with_its_value(chat: object, problem: str) -> None:
    with pytest.raises(InvalidRequestError, match=problem):
        sent(chat)


@pytest.mark.parametrize(
    ("prompt", "token_ids", "problem"),
    [(7, None, "prompt is 7"), (b"x", None, "prompt is b'x'"), (None, "12", "token_ids is '12'"),
     (None, {1: 2}, "token_ids is {1: 2}"), (None, [-1], "cannot be sent"), (None, ["a"], "cannot be sent")],
)  # fmt: skip
def test_what_is_no_prompt_is_refused_with_its_value(prompt: object, token_ids: object, problem: str) -> None:
    with pytest.raises(InvalidRequestError, match=problem):
        generate_request(prompt, token_ids, None, None)  # type: ignore[arg-type]


def test_keywords_of_sampling_win_over_the_object_and_none_is_not_given() -> None:
    given = SamplingParams(temperature=0.5, max_tokens=7)
    request = generate_request("x", None, None, given, max_tokens=9, stop="END", top_p=None, user="me")
    expected = SamplingParams(temperature=0.5, max_tokens=9, stop=("END",))
    assert sampling_from_proto(request.sampling) == expected
    assert request.user == "me"
    assert not generate_request("x", None, None, None, temperature=None).HasField("sampling")


def test_every_field_of_sampling_is_a_keyword() -> None:
    assert set(SamplingOptions.__annotations__) == {field.name for field in fields(SamplingParams)} - {
        "bad_words_token_ids"
    }


def test_an_unknown_keyword_gets_a_hint() -> None:
    with pytest.raises(InvalidRequestError, match="no option 'max_token'; did you mean max_tokens"):
        generate_request("x", None, None, None, max_token=3)  # type: ignore[call-arg]


def test_both_clients_have_the_same_methods_and_parameters() -> None:
    def methods(client: type) -> dict[str, list[str]]:
        found = inspect.getmembers(client, inspect.isfunction)
        return {name: list(inspect.signature(f).parameters) for name, f in found if not name.startswith("_")}

    assert methods(BatonClient) == methods(AsyncBatonClient)


@pytest.mark.parametrize(
    ("given", "target"),
    [
        (None, "127.0.0.1:50051"), ("host", "host:50051"), ("host:7", "host:7"), ("[::1]:7", "[::1]:7"),
        ("[::1]", "[::1]:50051"), ("::1", "[::1]:50051"), ("unix:/run/baton.sock", "unix:/run/baton.sock"),
        (Connection("host:7", token="t"), "host:7"),
    ],
)  # fmt: skip
def test_an_address_may_be_text(given: object, target: str) -> None:
    assert Connection.of(given).target == target  # type: ignore[arg-type]


@pytest.mark.parametrize("given", ["", "http://host:7", "host:", "host:x", ":7", "host:99999", "a b", 7, b"host"])
def test_what_is_no_address_is_refused_with_its_value(given: object) -> None:
    for client in (BatonClient, Connection.of):
        with pytest.raises(ConfigError) as caught:
            client(given).target  # type: ignore[union-attr, arg-type, operator]  # noqa: B018
        assert repr(given) in str(caught.value)


async def test_an_async_client_does_all_that_the_other_does(serve: Callable, answer: Callable) -> None:
    served = await serve(answer("ok"))
    async with AsyncBatonClient(served.server.address) as client:
        whole = await client.generate_once(chat=[{"role": "user", "content": "hi"}], max_tokens=2, temperature=0)
        assert (whole.text, whole.token_ids) == ("ok", tuple(served.tokenizer.encode("ok")))
        assert served.engine.requests[-1].sampling.max_tokens == 2
        assert await client.tokenize("ab") == served.tokenizer.encode("ab")
        assert await client.health() == (True, "")
        assert (await client.explain("ab", max_tokens=3)).max_tokens == 3
