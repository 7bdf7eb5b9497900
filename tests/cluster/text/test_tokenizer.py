"""Loading, encoding, chats and early refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cluster.conversation.messages import ChatMessage
from cluster.text.length_bound import LengthBound, length_bound
from cluster.text.tokenizer import Tokenizer
from cluster.text.tokenizer_files import load_tokenizers
from workers.errors import CheckpointError, InvalidRequestError

SaveTokenizer = Callable[..., Path]

# Encoding and decoding


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40))
def test_encoding_equals_transformers(
    any_tokenizer: Tokenizer, any_reference: PreTrainedTokenizerBase, text: str
) -> None:
    without = any_reference(text, add_special_tokens=False).input_ids
    assert any_tokenizer.encode(text) == any_reference(text).input_ids
    assert any_tokenizer.encode(text, add_special_tokens=False) == without


def test_special_tokens_of_the_checkpoint_come_once(byte_level_tokenizer: Tokenizer) -> None:
    bos = byte_level_tokenizer.vocab["<s>"]
    token_ids = byte_level_tokenizer.encode("hello")
    assert token_ids.count(bos) == 1
    assert token_ids[0] == bos
    assert byte_level_tokenizer.decode(token_ids) == "hello"


def test_threads_may_share_a_tokenizer(byte_level_tokenizer: Tokenizer) -> None:
    texts = [f"text number {n} 日本語 " * 200 for n in range(40)]
    expected = [byte_level_tokenizer.encode(text) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(byte_level_tokenizer.encode, texts)) == expected


def test_a_saved_truncation_or_padding_is_not_applied(saved_tokenizer: SaveTokenizer) -> None:
    folder = saved_tokenizer()
    rust = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    rust.enable_truncation(4)
    rust.enable_padding(length=4)
    rust.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.load(folder)
    assert len(tokenizer.encode("one two three four five six seven")) > 4
    assert len(tokenizer.encode("a")) == 2


def test_a_lone_surrogate_is_refused(byte_level_tokenizer: Tokenizer) -> None:
    for call in (byte_level_tokenizer.encode, lambda text: byte_level_tokenizer.check_length(text, 10)):
        with pytest.raises(InvalidRequestError, match="lone surrogate at character 2"):
            call("ab\ud800")


def test_the_vocabulary_has_every_token(any_tokenizer: Tokenizer, any_reference: PreTrainedTokenizerBase) -> None:
    assert any_tokenizer.vocab == any_reference.get_vocab()
    assert any_tokenizer.vocab_size == max(any_tokenizer.vocab.values()) + 1


def test_a_piece_has_the_space_before_it(loaded: dict[str, Tokenizer]) -> None:
    for kind in ("byte_fallback", "metaspace"):
        vocab = loaded[kind].vocab
        assert [loaded[kind].token_text(vocab[token]) for token in ("▁the", "a", "</s>")] == [" the", "a", ""]
    vocab = loaded["byte_fallback"].vocab
    assert [loaded["byte_fallback"].token_text(vocab[token]) for token in ("<0x0A>", "<0xC3>")] == ["\n", "\ufffd"]
    vocab = loaded["word_piece"].vocab
    assert [loaded["word_piece"].token_text(vocab[token]) for token in ("fox", "##es")] == [" fox", "es"]


# The file itself


@pytest.mark.parametrize("tokenizer_class", ["LlamaTokenizer", "LlamaTokenizerFast", "GemmaTokenizerFast", None])
@pytest.mark.parametrize("text", ["a fox", " a", "    def", "\n the", "</s> the", ""])
def test_a_prompt_is_tokenised_by_the_file_whatever_the_class(
    saved_tokenizer: SaveTokenizer, tokenizer_class: str | None, text: str
) -> None:
    folder = saved_tokenizer("byte_fallback", tokenizer_class=tokenizer_class, unk_token="<unk>")
    tokenizer, file = Tokenizer.load(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for special in (True, False):
        token_ids = file.encode(text, add_special_tokens=special).ids
        assert tokenizer.encode(text, add_special_tokens=special) == token_ids
        assert tokenizer.text_of(token_ids) == file.decode(token_ids)


@pytest.mark.parametrize(
    ("config", "begins", "ends"),
    [
        ({}, True, False),
        ({"add_bos_token": True}, True, False),
        ({"add_eos_token": False}, True, False),
        ({"add_bos_token": False}, False, False),
        ({"add_eos_token": True}, True, True),
    ],
)
def test_tokenizer_config_decides_on_the_tokens_at_the_ends(
    saved_tokenizer: SaveTokenizer, config: dict[str, bool], begins: bool, ends: bool
) -> None:
    tokenizer = Tokenizer.load(saved_tokenizer("byte_fallback", unk_token="<unk>", **config))
    token_ids = tokenizer.encode("a fox")
    assert (token_ids[0] == tokenizer.vocab["<s>"], token_ids[-1] == tokenizer.vocab["</s>"]) == (begins, ends)


def test_tokens_that_only_tokenizer_config_names_are_special(saved_tokenizer: SaveTokenizer) -> None:
    tokenizer = Tokenizer.load(saved_tokenizer("byte_fallback", eos_token="<|end|>", tokenizer_class="LlamaTokenizer"))
    assert tokenizer.special_token_ids["<|end|>"] == tokenizer.vocab_size - 1
    assert tokenizer.encode("a<|end|>", add_special_tokens=False)[-1] == tokenizer.vocab_size - 1


# Damaged checkpoints


def assert_refused(folder: Path, file: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.load(folder)
    assert str(folder / file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_tokenizer_json_is_named(saved_tokenizer: SaveTokenizer) -> None:
    folder = saved_tokenizer()
    (folder / "tokenizer.json").unlink()
    assert_refused(folder, "tokenizer.json")
    assert_refused(folder / "nowhere", "tokenizer.json")


@pytest.mark.parametrize("damage", [lambda text: text[: len(text) // 2], lambda _: "{}", lambda _: "", lambda _: "[1]"])
def test_a_damaged_tokenizer_json_is_named(saved_tokenizer: SaveTokenizer, damage: Callable[[str], str]) -> None:
    folder = saved_tokenizer()
    path = folder / "tokenizer.json"
    path.write_text(damage(path.read_text()))
    assert_refused(folder, "tokenizer.json")


def test_a_damaged_tokenizer_config_is_named(saved_tokenizer: SaveTokenizer) -> None:
    folder = saved_tokenizer()
    (folder / "tokenizer_config.json").write_text('{"bos_token": ')
    assert_refused(folder, "tokenizer_config.json")


def test_code_of_a_checkpoint_is_not_run(saved_tokenizer: SaveTokenizer) -> None:
    folder = saved_tokenizer(tokenizer_class="Odd", auto_map={"AutoTokenizer": ["odd.Odd", "odd.Odd"]})
    (folder / "odd.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Odd: pass\n")
    with pytest.raises(CheckpointError):
        Tokenizer.load(folder)
    assert not (folder / "ran").exists()


# Chats


def test_a_chat_is_rendered_as_transformers_does(
    byte_level_tokenizer: Tokenizer, byte_level_reference: PreTrainedTokenizerBase
) -> None:
    messages = [ChatMessage("user", "hi <tool>"), ChatMessage("assistant", "née"), ChatMessage("user", "bye")]
    prompt = byte_level_tokenizer.apply_chat_template(messages)
    assert prompt == "<s>[user] hi <tool>\n[assistant] née\n[user] bye\n[assistant] "
    token_ids = byte_level_tokenizer.encode(prompt, add_special_tokens=False)
    expected = byte_level_reference.apply_chat_template(
        [{"role": message.role, "content": message.content} for message in messages],
        add_generation_prompt=True,
        return_dict=False,
    )
    assert token_ids == expected
    assert token_ids.count(byte_level_tokenizer.vocab["<s>"]) == 1


def test_a_checkpoint_without_a_chat_template_says_so(saved_tokenizer: SaveTokenizer) -> None:
    tokenizer = Tokenizer.load(saved_tokenizer(chat_template=None))
    with pytest.raises(InvalidRequestError, match="no chat template"):
        tokenizer.apply_chat_template([ChatMessage("user", "hi")])


def test_what_the_template_refuses_is_told(byte_level_tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="no role wizard"):
        byte_level_tokenizer.apply_chat_template([ChatMessage("wizard", "hi")])
    with pytest.raises(InvalidRequestError, match="empty"):
        byte_level_tokenizer.apply_chat_template([])


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for message in messages %}", "Unexpected end of template"),
        ("{{ raise_exception('not here') }}", "not here"),
        ("{{ messages[0].nothing.more }}", "nothing"),
        ("a prompt of its own", "leaves out what the user says"),
        ({"tool_use": "{{ messages[0].content }}"}, "default"),
    ],
)
def test_a_template_that_makes_no_prompt_is_none(saved_tokenizer: SaveTokenizer, template: object, reason: str) -> None:
    tokenizer = Tokenizer.load(saved_tokenizer(chat_template=template))
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequestError, match=f"chat template does not work .*{reason}"):
        tokenizer.apply_chat_template([ChatMessage("user", "hi")])


@pytest.mark.parametrize("first", ["user", "system"])
def test_a_template_may_ask_for_its_first_message(saved_tokenizer: SaveTokenizer, first: str) -> None:
    refuse = f"{{% if messages[0].role != '{first}' %}}{{{{ raise_exception('no') }}}}{{% endif %}}"
    template = refuse + "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert Tokenizer.load(saved_tokenizer(chat_template=template)).has_chat_template


# Early refusal


def test_ten_megabytes_are_refused_with_both_numbers(byte_level_tokenizer: Tokenizer) -> None:
    bound = byte_level_tokenizer.length_bound
    assert bound is not None
    with pytest.raises(InvalidRequestError) as caught:
        byte_level_tokenizer.check_length("a" * 10_000_000, 2048)
    assert "10000000 bytes" in str(caught.value)
    assert "2048 tokens" in str(caught.value)
    assert str(2048 * bound.bytes_per_token) in str(caught.value)
    byte_level_tokenizer.check_length("a" * 2048 * bound.bytes_per_token, 2048)


@settings(max_examples=100, deadline=None)
@given(
    text=st.one_of(
        st.text(max_size=60),
        st.lists(
            st.sampled_from([" the", "again", "née", "<tool>", "<｜終わり｜>", "e\u0301", "\u212a", "  ", "日本"])
        ).map("".join),
    ),
)
@example(text="\u1100\u1161\u11a8" * 20)
@example(text="\u1fbe\u0308\u0341" * 20)
@example(text="again" * 50)
def test_what_fits_is_never_refused(any_tokenizer: Tokenizer, text: str) -> None:
    any_tokenizer.check_length(text, len(any_tokenizer.encode(text, add_special_tokens=False)))


def test_long_tokens_raise_the_bound() -> None:
    tokenizer = bpe({"a" * 50: 300})
    assert length_bound(tokenizer) == LengthBound(50)
    tokenizer.add_tokens(["é" * 40])
    assert length_bound(tokenizer) == LengthBound(80)


def bpe(extra: dict[str, int] | None = None, **model: object) -> tokenizers.Tokenizer:
    alphabet = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = tokenizers.Tokenizer(models.BPE({**alphabet, **(extra or {})}, [], **model))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def test_text_that_a_tokenizer_may_lose_is_not_counted() -> None:
    tokenizer = bpe()
    tokenizer.add_special_tokens([AddedToken("<m>", lstrip=True)])
    text = " " * 1000 + "<m>"
    assert len(tokenizer.encode(text).ids) == 1
    bound = length_bound(tokenizer)
    assert bound is not None
    assert not bound.exceeds(text, 1)
    assert bound.exceeds("x" * 1000, 1)


def test_text_that_normalising_shortens_is_counted_in_its_short_form() -> None:
    tokenizer = bpe()
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens([AddedToken("K" * 8, normalized=True)])
    text = 8 * "\N{KELVIN SIGN}"
    assert len(tokenizer.encode(text).ids) == 1
    bound = length_bound(tokenizer)
    assert bound == LengthBound(8, composes=True)
    assert not bound.exceeds(text, 1)
    assert bound.exceeds(text + "K", 1)


def no_bound_cases() -> dict[str, tokenizers.Tokenizer]:
    lowercase, deletes, removes = bpe(), bpe(), bpe()
    lowercase.normalizer = normalizers.Lowercase()
    deletes.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace("x", "")])
    removes.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("x", "removed"), removes.pre_tokenizer])
    return {
        "a normaliser that shortens": lowercase,
        "a normaliser that deletes": deletes,
        "a splitter that removes": removes,
        "unknown characters vanish": tokenizers.Tokenizer(models.BPE({"a": 0}, [])),
        "unknown characters are fused": tokenizers.Tokenizer(
            models.BPE({"a": 0, "<u>": 1}, [], unk_token="<u>", fuse_unk=True)
        ),
        "unknown words": tokenizers.Tokenizer(models.WordLevel({"<u>": 0}, unk_token="<u>")),
    }


@pytest.mark.parametrize("case", list(no_bound_cases()))
def test_no_bound_is_claimed_where_text_may_vanish(case: str) -> None:
    assert length_bound(no_bound_cases()[case]) is None


def test_without_a_bound_nothing_is_refused_early(saved_tokenizer: SaveTokenizer) -> None:
    tokenizer = Tokenizer(AutoTokenizer.from_pretrained(str(saved_tokenizer("word_piece"))))
    assert tokenizer.length_bound is None
    tokenizer.check_length("a" * 1_000_000, 1)


def test_one_unknown_token_per_character_is_bounded() -> None:
    tokenizer = tokenizers.Tokenizer(models.BPE({"a": 0, "<u>": 1}, [], unk_token="<u>"))
    bound = length_bound(tokenizer)
    assert bound == LengthBound(4)
    assert not bound.exceeds("😀" * 10, len(tokenizer.encode("😀" * 10).ids))


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3", "qwen2", "mixtral", "a_type_of_its_own"])
@pytest.mark.parametrize(
    "named", ["LlamaTokenizerFast", "PreTrainedTokenizerFast", "Qwen2Tokenizer", "NoSuchClass", None]
)
def test_the_class_is_the_one_that_transformers_takes(
    saved_tokenizer: SaveTokenizer, model_type: str, named: str | None
) -> None:
    folder = saved_tokenizer()
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": named}
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    try:
        expected = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError):
        with pytest.raises(CheckpointError):
            load_tokenizers(folder)
        return
    ours, _ = load_tokenizers(folder)
    assert type(ours) is type(expected)
    assert ours("one two three").input_ids == expected("one two three").input_ids
