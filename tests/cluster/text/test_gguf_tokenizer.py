"""Tokenizers of GGUF files: the same ids as the tokenizer.json that they were written from, and as transformers has."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import transformers

from cluster.text.gguf.vocabulary import read_vocabulary
from cluster.text.tokenizer import ChatMessage, Tokenizer
from gguf_files import write_vocabulary
from workers.errors import CheckpointError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
TEXTS = [
    "The quick brown fox jumps over the lazy dog, again and again.",
    "naïve café über straße — “quotes” … 12345",
    "日本語のテキスト、中文文本 ❤️ 🇩🇪 e\u0301",
    "  two spaces,\n\n\nlines\tand tabs; it's WE'LL don't   end  ",
    "",
    " ",
    "HTTPServer2 camelCase/path_1",
]


def keys_of(folder: Path, kind: str) -> dict[str, Any]:
    """What llama.cpp's converter writes of a tokenizer.json."""
    saved = json.loads((folder / "tokenizer.json").read_text())
    vocab: dict[str, int] = saved["model"]["vocab"]
    added = {token["content"]: token for token in saved["added_tokens"]}
    tokens = sorted({**vocab, **{content: token["id"] for content, token in added.items()}}.items(), key=lambda x: x[1])
    types = [
        (CONTROL if added[token]["special"] else USER_DEFINED)
        if token in added
        else UNKNOWN
        if token == "<unk>"
        else BYTE
        if token.startswith("<0x")
        else NORMAL
        for token, _ in tokens
    ]
    ids = dict(tokens)
    merges = [" ".join(pair) for pair in saved["model"]["merges"]]
    keys = {
        "model": kind,
        "tokens": [token for token, _ in tokens],
        "token_type": types,
        "bos_token_id": ids["<s>"],
        "eos_token_id": ids["</s>"],
        "tokenizer.chat_template": json.loads((folder / "tokenizer_config.json").read_text())["chat_template"],
    }
    if kind == "gpt2":
        return {**keys, "merges": merges, "add_bos_token": True}
    ranks = {merge.replace(" ", ""): float(-rank) for rank, merge in enumerate(merges)}
    scores = [ranks.get(token, -1000.0) for token, _ in tokens]
    return {**keys, "scores": scores, "unknown_token_id": ids["<unk>"]}


def random_texts() -> list[str]:
    rng = random.Random(0)
    alphabet = "abthe quick\n 0129éß日本👍'.,<s>▁"
    return ["".join(rng.choices(alphabet, k=rng.randrange(40))) for _ in range(100)]


@pytest.mark.parametrize(
    ("kind", "named", "more"),
    [
        ("byte_level", "gpt2", {"pre": "gpt-2"}),
        ("byte_fallback", "llama", {}),
    ],
)
def test_ids_are_those_of_the_tokenizer_json(
    folders: dict[str, Path], loaded: dict[str, Tokenizer], tmp_path: Path, kind: str, named: str, more: dict[str, Any]
) -> None:
    file = write_vocabulary(tmp_path / "vocabulary.gguf", {**keys_of(folders[kind], named), **more})
    ours, expected = Tokenizer.load(file), loaded[kind]
    assert ours.vocab == expected.vocab
    assert ours.eos_token_ids == expected.eos_token_ids
    for text in [*TEXTS, *random_texts()]:
        if kind == "byte_level" and "e\u0301" in text:
            continue  # that tokenizer composes, and GPT-2 does not
        ids = expected.encode(text)
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == expected.decode(ids)
        assert [ours.token_kind(token) for token in ids] == [expected.token_kind(token) for token in ids]
    chat = [ChatMessage("user", "hello"), ChatMessage("assistant", "fox")]
    assert ours.apply_chat_template(chat) == expected.apply_chat_template(chat)


@pytest.mark.parametrize("split", ["llama-bpe", "qwen2", "tekken", "gpt-2"])
def test_splits_are_those_of_transformers(folders: dict[str, Path], tmp_path: Path, split: str) -> None:
    keys = {**keys_of(folders["byte_level"], "gpt2"), "pre": split}
    file = write_vocabulary(tmp_path / "vocabulary.gguf", keys)
    expected = transformers.AutoTokenizer.from_pretrained(
        tmp_path, gguf_file=file.name, config=transformers.LlamaConfig()
    )
    ours = Tokenizer.load(file)
    for text in TEXTS[:2] + TEXTS[3:]:
        assert ours.encode(text, add_special_tokens=False) == expected.encode(text, add_special_tokens=False), text


def test_smollm_has_a_token_for_every_digit(folders: dict[str, Path], tmp_path: Path) -> None:
    keys = keys_of(folders["byte_level"], "gpt2")
    keys = {**keys, "pre": "smollm", "tokens": [*keys["tokens"], "12"], "token_type": [*keys["token_type"], NORMAL]}
    keys["merges"] = ["1 2", *keys["merges"]]
    ours = Tokenizer.load(write_vocabulary(tmp_path / "a.gguf", keys))
    assert [ours.decode([token]) for token in ours.encode("x12", add_special_tokens=False)] == ["x", "1", "2"]
    other = Tokenizer.load(write_vocabulary(tmp_path / "b.gguf", {**keys, "pre": "gpt-2"}))
    assert [other.decode([token]) for token in other.encode("x12", add_special_tokens=False)] == ["x", "12"]


def test_gemmas_spaces_are_tokens_of_several(folders: dict[str, Path], tmp_path: Path) -> None:
    """The file spells them as spaces; its scores say nothing of the order, its ids do."""
    keys = keys_of(folders["byte_fallback"], "llama")
    place = keys["tokens"].index("▁▁")
    keys["tokens"][place], keys["token_type"][place] = "  ", USER_DEFINED
    keys |= {"scores": [0.0] * len(keys["tokens"]), "add_space_prefix": False}
    ours = Tokenizer.load(write_vocabulary(tmp_path / "a.gguf", keys, "gemma3"))
    ids = ours.encode("the  the", add_special_tokens=False)
    assert place in ids
    assert ours.decode(ids) == "the  the"


def test_what_ends_a_turn_is_known_without_being_said(folders: dict[str, Path], tmp_path: Path) -> None:
    keys = keys_of(folders["byte_level"], "gpt2")
    keys["tokens"] += ["<|im_end|>", "<|eot_id|>"]
    keys["token_type"] += [CONTROL, NORMAL]
    vocabulary = read_vocabulary(write_vocabulary(tmp_path / "a.gguf", {**keys, "pre": "qwen2"}))
    assert set(vocabulary.end_token_ids) == {keys["eos_token_id"], keys["tokens"].index("<|im_end|>")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "t5"}, "tokenizer.ggml.model: 't5' is not supported, only gpt2, llama"),
        ({"pre": "poro-chat"}, "tokenizer.ggml.pre: 'poro-chat' is not supported, only gpt-2"),
        ({"pre": None}, "tokenizer.ggml.pre: None is not supported"),
        ({"merges": None}, "tokenizer.ggml.merges: is missing"),
        ({"merges": ["a"]}, "tokenizer.ggml.merges: 'a' is no pair of pieces"),
        ({"merges": ["absent here"]}, "tokenizer.ggml.merges: make no tokenizer"),
        ({"tokens": None}, "tokenizer.ggml.tokens: is missing"),
        ({"token_type": [1, 1]}, "tokenizer.ggml.token_type: has 2 entries for"),
        ({"bos_token_id": 10**6}, "tokenizer.ggml.bos_token_id: 1000000 is none of the"),
        ({"model": "llama"}, "tokenizer.ggml.scores: is missing"),
        ({"add_bos_token": "yes"}, "tokenizer.ggml.add_bos_token: must be true or false"),
    ],
)
def test_what_makes_no_tokenizer(
    folders: dict[str, Path], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    keys = {**keys_of(folders["byte_level"], "gpt2"), "pre": "gpt-2", **change}
    file = write_vocabulary(tmp_path / "vocabulary.gguf", keys)
    with pytest.raises(CheckpointError, match=message) as raised:
        Tokenizer.load(file)
    assert str(file) in str(raised.value)
