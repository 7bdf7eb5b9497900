"""Completions and chats through the official client, unchanged."""

import asyncio
import json
import re
import subprocess
from pathlib import Path

import openai
import pytest

from cluster.client.client import BatonClient
from workers.sampling_params import SamplingParams

README = Path(__file__).parents[4] / "README.md"
ADDRESS = "http://127.0.0.1:8000"
PROMPT, ANSWER = "ada 4127, bob 9083; bob?", " 9083"
CHAT = [{"role": "user", "content": PROMPT}]


def test_a_completion_has_its_text_its_end_and_its_usage(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="recall", prompt=PROMPT, temperature=0)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, choice.index) == (ANSWER, "stop", 0)
    assert (answer.object, answer.model) == ("text_completion", "recall")
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.completion_tokens == 6  # the digits, a space, and the token that ended the text


def test_cached_tokens_are_counted(client: openai.OpenAI) -> None:
    prompt = "kim 5555, lou 6666, max 7777, ned 8888, ora 9999; max?"
    first, again = (client.completions.create(model="recall", prompt=prompt, max_tokens=1).usage for _ in range(2))
    assert first.prompt_tokens_details.cached_tokens == 0
    assert 0 < again.prompt_tokens_details.cached_tokens < again.prompt_tokens


def test_the_parts_of_a_stream_are_the_whole(client: openai.OpenAI) -> None:
    ask = {"model": "recall", "prompt": PROMPT, "temperature": 0, "logprobs": 2}
    whole = client.completions.create(**ask)
    parts = list(client.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    choices = [part.choices[0] for part in parts[:-1]]
    assert "".join(choice.text for choice in choices) == whole.choices[0].text
    assert [choice.finish_reason for choice in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1].finish_reason == "stop"
    for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        joined = [value for choice in choices for value in getattr(choice.logprobs, field)]
        assert joined == getattr(whole.choices[0].logprobs, field)
    assert all(part.usage is None for part in parts[:-1])
    assert (parts[-1].choices, parts[-1].usage.completion_tokens) == ([], whole.usage.completion_tokens)


def test_a_chat_streams_who_speaks_and_what(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="recall", messages=CHAT, temperature=0)
    assert (whole.choices[0].message.role, whole.choices[0].message.content) == ("assistant", ANSWER)
    parts = list(client.chat.completions.create(model="recall", messages=CHAT, temperature=0, stream=True))
    deltas = [part.choices[0].delta for part in parts]
    assert [delta.role for delta in deltas] == ["assistant", *[None] * (len(deltas) - 1)]
    assert "".join(delta.content or "" for delta in deltas) == ANSWER
    assert parts[-1].choices[0].finish_reason == "stop"
    assert len({part.id for part in parts}) == 1


def test_the_log_probabilities_of_a_chat_have_bytes_and_alternatives(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="recall", messages=CHAT, temperature=0, logprobs=True, top_logprobs=3)
    entries = answer.choices[0].logprobs.content
    assert bytes(b for entry in entries[:-1] for b in entry.bytes).decode() == ANSWER
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert (entry.top_logprobs[0].token, entry.top_logprobs[0].logprob) == (entry.token, entry.logprob)
        assert entry.logprob <= 0
    only = client.chat.completions.create(model="recall", messages=CHAT, temperature=0, logprobs=True)
    assert all(entry.top_logprobs == [] for entry in only.choices[0].logprobs.content)


def test_several_answers_differ_and_the_first_is_the_one_alone(client: openai.OpenAI) -> None:
    ask = {"model": "recall", "prompt": "a", "temperature": 2.0, "seed": 5, "max_tokens": 8}
    alone = client.completions.create(**ask).choices[0].text
    three = client.completions.create(**ask, n=3)
    texts = [choice.text for choice in three.choices]
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    assert texts[0] == alone
    assert len(set(texts)) == 3
    again = {0: "", 1: "", 2: ""}
    for part in client.completions.create(**ask, n=3, stream=True):
        again[part.choices[0].index] += part.choices[0].text
    assert list(again.values()) == texts
    assert three.usage.prompt_tokens == client.completions.create(**ask).usage.prompt_tokens


def test_a_prompt_is_computed_once_for_all_its_answers(client: openai.OpenAI, service) -> None:
    prompt = "una 1212, vic 2323, wes 3434, xan 4545, yul 5656; vic?"
    ask = {"model": "recall", "prompt": prompt, "temperature": 1.5, "seed": 7, "max_tokens": 6}
    seen: list[int] = []
    engine_generate = service.engine.generate
    service.engine.generate = lambda request: seen.append(request.sampling.n) or engine_generate(request)
    try:
        three = client.completions.create(**ask, n=3)
        alike = client.completions.create(**{**ask, "temperature": 0}, n=3)
    finally:
        del service.engine.generate
    assert seen == [3, 1]
    prompt_tokens = len(service.run(service.generation.tokenize(prompt)))
    for answer in (three, alike):
        assert answer.usage.prompt_tokens == prompt_tokens
        assert answer.usage.prompt_tokens_details.cached_tokens < prompt_tokens
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert three.usage.prompt_tokens_details.cached_tokens == 0
    alone = client.completions.create(**{**ask, "temperature": 0})
    assert [choice.text for choice in alike.choices] == [alone.choices[0].text] * 3
    assert alike.usage.completion_tokens == 3 * alone.usage.completion_tokens
    for number, choice in enumerate(three.choices):
        assert client.completions.create(**{**ask, "seed": 7 + number}).choices[0].text == choice.text


def test_samples_of_several_prompts_stream_side_by_side(client: openai.OpenAI) -> None:
    ask = {"model": "recall", "prompt": ["a", "b"], "temperature": 2.0, "seed": 3, "max_tokens": 5, "n": 2}
    whole = client.completions.create(**ask)
    parts = client.completions.create(**ask, stream=True, stream_options={"include_usage": True})
    texts, usage = [""] * 4, None
    for part in parts:
        usage = part.usage or usage
        for choice in part.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    assert usage.total_tokens == whole.usage.total_tokens


def test_an_echo_has_the_log_probabilities_of_its_prompt(client: openai.OpenAI, service) -> None:
    ask = {"model": "recall", "prompt": PROMPT, "temperature": 0, "logprobs": 2, "echo": True}
    (choice,) = client.completions.create(**ask).choices
    tokens = service.run(service.generation.tokenize(PROMPT)).tolist()
    lists = choice.logprobs
    assert choice.text == PROMPT + ANSWER
    assert (lists.token_logprobs[0], lists.top_logprobs[0]) == (None, None)
    assert all(value <= 0 for value in lists.token_logprobs[1:])
    for offset, token in zip(lists.text_offset[1:-1], lists.tokens[1:-1], strict=True):
        assert choice.text[offset:].startswith(token)
    for token, logprob, top in zip(lists.tokens, lists.token_logprobs, lists.top_logprobs, strict=True):
        assert top is None or (top[token] == logprob and 2 <= len(top) <= 3)
    plain = client.completions.create(**{**ask, "echo": False}).choices[0].logprobs
    assert lists.tokens[len(tokens) :] == plain.tokens
    assert lists.token_logprobs[len(tokens) :] == pytest.approx(plain.token_logprobs, abs=1e-5)
    parts = [part.choices[0] for part in client.completions.create(**ask, stream=True)]
    for field in ("tokens", "text_offset", "token_logprobs"):
        assert [value for part in parts for value in getattr(part.logprobs, field)] == getattr(lists, field)
    both = client.completions.create(**{**ask, "prompt": ["ada 1", "b"], "temperature": 1.0}, n=2, max_tokens=1).choices
    assert [each.logprobs.token_logprobs[0] for each in both] == [None] * 4
    assert both[0].logprobs.tokens[:-1] == both[1].logprobs.tokens[:-1] != both[2].logprobs.tokens[:-1]


def test_a_prompt_is_scored_as_if_it_were_the_answer(client: openai.OpenAI, service) -> None:
    ask = {"model": "recall", "temperature": 0, "max_tokens": 4, "extra_body": {"return_token_ids": True}}
    answer = client.completions.create(**ask, prompt=PROMPT, logprobs=1).choices[0]
    prompt = [*service.run(service.generation.tokenize(PROMPT)).tolist(), *answer.token_ids]
    scored = {**ask, "extra_body": {"prompt_logprobs": 1}}
    entries = client.completions.create(**scored, prompt=prompt).choices[0].prompt_logprobs
    assert len(entries) == len(prompt)
    assert entries[0] is None
    for token_id, entry, logprob in zip(answer.token_ids, entries[-4:], answer.logprobs.token_logprobs, strict=True):
        assert entry[str(token_id)]["logprob"] == pytest.approx(logprob, abs=1e-4)
        assert entry[str(token_id)]["rank"] == 1
    assert "".join(entries[at][str(prompt[at])]["decoded_token"] for at in (-4, -3)) == ANSWER[:2]
    chat = {"model": "recall", "messages": CHAT, "temperature": 0, "extra_body": {"prompt_logprobs": 0}}
    answer = client.chat.completions.create(**chat)
    assert len(answer.prompt_logprobs) == answer.usage.prompt_tokens
    assert all(len(entry) == 1 for entry in answer.prompt_logprobs[1:])
    first, *others = client.chat.completions.create(**chat, stream=True)
    assert first.prompt_logprobs == answer.prompt_logprobs
    assert not any("prompt_logprobs" in (part.model_extra or {}) for part in others)
    several = {**scored, "prompt": [prompt, prompt[:20]], "n": 2}
    whole = client.completions.create(**several).choices
    parts = [part.choices[0] for part in client.completions.create(**several, stream=True)]
    for index in range(4):
        opening, *rest = [part for part in parts if part.index == index]
        assert opening.prompt_logprobs == whole[index].prompt_logprobs
        assert not any("prompt_logprobs" in (part.model_extra or {}) for part in rest)


def test_prompts_come_in_four_forms(client: openai.OpenAI, service) -> None:
    ids = service.run(service.generation.tokenize(PROMPT)).tolist()
    for prompt, count in ((PROMPT, 1), ([PROMPT, PROMPT], 2), (ids, 1), ([ids, ids, ids], 3)):
        answer = client.completions.create(model="recall", prompt=prompt, temperature=0)
        assert [choice.text for choice in answer.choices] == [ANSWER] * count
        assert answer.usage.prompt_tokens == count * len(ids)


def test_what_vllm_adds_is_there(client: openai.OpenAI) -> None:
    def ask(**extra: object):
        return client.completions.create(model="recall", prompt=PROMPT, temperature=0, extra_body=extra).choices[0]

    assert (ask(ignore_eos=True, min_tokens=9, max_tokens=9).finish_reason, ask().stop_reason) == ("length", None)
    stopped = ask(stop=["08"])
    assert (stopped.text, stopped.finish_reason, stopped.stop_reason) == (" 9", "stop", "08")
    assert ask(stop=["08"], include_stop_str_in_output=True).text == " 908"
    ids = ask(return_token_ids=True).token_ids
    assert len(ids) == 6
    by_token = ask(stop_token_ids=[ids[3]])
    assert (by_token.text, by_token.stop_reason) == (" 90", ids[3])
    assert ask(skip_special_tokens=False, ignore_eos=True, max_tokens=6).text == " 9083<|eos|>"
    assert ask(echo=True).text == PROMPT + ANSWER
    bare, whole = (ask(add_special_tokens=add, return_token_ids=True).prompt_token_ids for add in (False, True))
    assert whole[1:] == bare
    assert ask(logprobs=1, return_tokens_as_token_ids=True).logprobs.tokens[0] == f"token_id:{ids[0]}"


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_both_doors_give_the_same_tokens(client: openai.OpenAI, service, temperature: float) -> None:
    prompt = "zoe 1, yan 22; yan?"
    sampling = SamplingParams(
        temperature=temperature, seed=11, max_tokens=12, ignore_eos=True, top_p=0.9, top_k=40, repetition_penalty=1.1
    )
    with BatonClient(service.grpc) as baton:
        expected = baton.generate_once(prompt, sampling=sampling)
    extra = {"top_k": 40, "repetition_penalty": 1.1, "ignore_eos": True, "return_token_ids": True}
    ask = {"model": "recall", "prompt": prompt, "temperature": temperature, "seed": 11, "max_tokens": 12, "top_p": 0.9}
    choice = client.completions.create(**ask, extra_body=extra).choices[0]
    assert (tuple(choice.token_ids), choice.text) == (expected.token_ids, expected.text)


def test_a_response_is_whole_and_streams_by_its_events(client: openai.OpenAI) -> None:
    ask = {"model": "recall", "input": PROMPT, "temperature": 0}
    whole = client.responses.create(**ask)
    assert (whole.output_text, whole.status) == (ANSWER, "completed")
    assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens
    events = list(client.responses.create(**ask, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == ANSWER
    assert [event.type for event in events[:4]] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert events[-1].type == "response.completed"
    assert events[-1].response.output_text == ANSWER
    cut = client.responses.create(**ask, max_output_tokens=2, instructions="be brief")
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")


def test_models_tokens_and_version(client: openai.OpenAI, service) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.max_model_len) == ("recall", 512)
    assert client.models.retrieve("recall").id == "recall"

    def post(path: str, **body: object) -> dict:
        return client.post(f"{service.url}{path}", body=body, cast_to=object)

    tokens = post("/tokenize", prompt=PROMPT, return_token_strs=True)
    assert tokens["tokens"] == service.run(service.generation.tokenize(PROMPT)).tolist()
    assert tokens["count"] == len(tokens["token_strs"]) == len(tokens["tokens"])
    assert post("/detokenize", tokens=tokens["tokens"])["prompt"] == "<|bos|>" + PROMPT
    assert post("/tokenize", messages=CHAT)["count"] > 0
    assert client.get(f"{service.url}/version", cast_to=object)["version"]
    assert client.get(f"{service.url}/health", cast_to=object) == {"status": "ok"}
    assert client.get(f"{service.url}/ready", cast_to=object)["ready"] is True


def test_clients_that_vanish_leave_nothing_behind(service) -> None:
    async def vanish(number: int) -> None:
        ask = {"model": "recall", "prompt": f"{PROMPT} {number}", "max_tokens": 400, "extra_body": {"ignore_eos": True}}
        if number % 2:
            parts = await client.completions.create(**ask, n=2, stream=True)
            await anext(parts)
            await parts.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                await client.completions.create(**ask, timeout=0.3)

    async def all_of_them() -> None:
        await asyncio.gather(*map(vanish, range(12)))
        await client.close()

    client = openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0)
    asyncio.run(all_of_them())
    service.until_idle()


def curl_lines() -> list[str]:
    text = README.read_text(encoding="utf-8").replace("\\\n", " ")
    return [line.strip() for line in re.findall(r"^curl .*", text, re.MULTILINE)]


def test_the_lines_of_the_readme_do_what_it_says(service) -> None:
    lines = curl_lines()
    assert len(lines) == 3
    answers = []
    for line in lines:
        assert ADDRESS in line
        command = line.replace(ADDRESS, service.url).replace("curl ", "curl -sS --fail-with-body ", 1)
        answers.append(
            subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True).stdout
        )
    models, completion, chat = answers
    assert json.loads(models)["data"][0]["id"] == "recall"
    assert json.loads(completion)["choices"][0]["text"] == " 9083"
    events = [json.loads(line.removeprefix("data: ")) for line in chat.splitlines() if line.startswith("data: {")]
    assert chat.endswith("data: [DONE]\n\n")
    assert events[-1]["choices"][0]["finish_reason"] in ("stop", "length")
