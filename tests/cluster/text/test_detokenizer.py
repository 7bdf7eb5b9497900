"""Streamed text is the whole text: for any tokens, cut anywhere, valid or not."""

from __future__ import annotations

import codecs
import unicodedata
from collections.abc import Sequence

from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from cluster.text.detokenizer import REPLACEMENT, IncrementalDetokenizer, TokenKind
from cluster.text.tokenizer import Tokenizer

PHRASES = [
    "👩‍👩‍👧‍👦",
    "👍🏽",
    "🇩🇪",
    "❤️",
    "日本語",
    "한국어",
    "नमस्ते",
    "e\u0301\u0323",
    "\ufffd",
    "\x00",
    "  the a",
    "née",
    "𐍈",
]
texts = st.lists(st.one_of(st.sampled_from(PHRASES), st.text(max_size=4)), max_size=12).map("".join)
cuts = st.lists(st.integers(1, 7), max_size=40)


def pieces(tokenizer: Tokenizer, token_ids: Sequence[int], sizes: Sequence[int] = ()) -> list[str]:
    """What comes out for pushes of these sizes, one token each after them; the last is what `finish` gives."""
    detokenizer = IncrementalDetokenizer(tokenizer)
    out, rest, sizes = [], list(token_ids), list(sizes)
    while rest:
        size = sizes.pop(0) if sizes else 1
        out.append(detokenizer.push(rest[:size]))
        rest = rest[size:]
    return [*out, detokenizer.finish()]


def by_rule(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """The text of a vocabulary with byte fallback: a wrong byte is U+FFFD, a space that begins it is none."""
    spelled = {token_id: token for token, token_id in tokenizer.vocab.items()}
    parts: list[str | bytes] = []
    for token_id in token_ids:
        kind = tokenizer.token_kind(token_id)
        if kind is TokenKind.BYTE:
            byte = bytes((tokenizer.byte_value(token_id),))
            run = parts.pop() if parts and isinstance(parts[-1], bytes) else b""
            parts.append(run + byte)
        elif kind is TokenKind.TEXT:
            parts.append(spelled[token_id].replace("▁", " "))
    codecs.register_error("each", lambda error: (REPLACEMENT * (error.end - error.start), error.end))
    return "".join(p.decode(errors="each") if isinstance(p, bytes) else p for p in parts).removeprefix(" ")


def byte_tokens(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """Every byte as its own token, in a byte-level vocabulary or one with byte fallback."""
    vocab = tokenizer.vocab
    if "<0x00>" in vocab:
        return [vocab[f"<0x{byte:02X}>"] for byte in data]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    return [vocab[symbols[byte]] for byte in data]


@settings(max_examples=150, deadline=None)
@given(text=texts, sizes=cuts)
def test_text_comes_back_in_pieces(byte_level_tokenizer: Tokenizer, text: str, sizes: list[int]) -> None:
    token_ids = byte_level_tokenizer.encode(text)
    out = pieces(byte_level_tokenizer, token_ids, sizes)
    assert "".join(out) == byte_level_tokenizer.text_of(token_ids) == unicodedata.normalize("NFC", text)
    # A character is never cut: U+FFFD appears only where the text has one.
    assert "".join(out).count(REPLACEMENT) == text.count(REPLACEMENT)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), sizes=cuts)
def test_any_tokens_give_the_decoded_text(
    any_tokenizer: Tokenizer, any_reference: PreTrainedTokenizerBase, data: st.DataObject, sizes: list[int]
) -> None:
    # Beyond the vocabulary too: models pad their embeddings.
    token_ids = data.draw(st.lists(st.integers(0, any_tokenizer.vocab_size + 3), max_size=60))
    out = pieces(any_tokenizer, token_ids, sizes)
    expected = any_reference.decode(
        [token_id for token_id in token_ids if token_id < any_tokenizer.vocab_size],
        skip_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )
    assert any_tokenizer.text_of(token_ids) == expected
    if "<0x00>" in any_tokenizer.vocab and REPLACEMENT in expected:
        expected = by_rule(any_tokenizer, token_ids)  # the library forgets characters beside a wrong byte
    assert "".join(out) == expected


@settings(max_examples=150, deadline=None)
@given(
    data=st.lists(st.one_of(st.binary(max_size=3), texts.map(str.encode), st.just(b"a")), max_size=10).map(b"".join),
    sizes=cuts,
)
@example(data=b"a\xff\xffb", sizes=[])
@example(data="é".encode() + b"\xff", sizes=[])
@example(data=b"\xf0\x9f\x98", sizes=[])
@example(data=b"\xe2\x82" * 20 + b"a", sizes=[])
@example(data="\ufffd".encode() * 9, sizes=[])
def test_any_bytes_give_the_decoded_text(
    byte_level_tokenizer: Tokenizer, byte_fallback_tokenizer: Tokenizer, data: bytes, sizes: list[int]
) -> None:
    token_ids = byte_tokens(byte_level_tokenizer, data)
    out = pieces(byte_level_tokenizer, token_ids, sizes)
    assert "".join(out) == byte_level_tokenizer.text_of(token_ids) == data.decode(errors="replace")
    token_ids = byte_tokens(byte_fallback_tokenizer, data)
    out = pieces(byte_fallback_tokenizer, token_ids, sizes)
    assert "".join(out) == by_rule(byte_fallback_tokenizer, token_ids)


@settings(max_examples=100, deadline=None)
@given(text=texts)
def test_what_was_shown_is_never_taken_back(any_tokenizer: Tokenizer, text: str) -> None:
    """After every token, the text so far is the beginning of the text that follows."""
    token_ids = any_tokenizer.encode(text)
    whole = any_tokenizer.text_of(token_ids)
    shown = ""
    for piece in pieces(any_tokenizer, token_ids):
        shown += piece
        assert whole.startswith(shown)


def test_a_character_appears_with_its_last_byte(byte_level_tokenizer: Tokenizer) -> None:
    token_ids = byte_tokens(byte_level_tokenizer, "a€😀b".encode())
    assert pieces(byte_level_tokenizer, token_ids) == ["a", "", "", "€", "", "", "", "😀", "b", ""]


def test_wrong_bytes_appear_one_token_later(byte_level_tokenizer: Tokenizer) -> None:
    token_ids = byte_tokens(byte_level_tokenizer, b"\xff\xff\xffa\xe2\x82")
    assert pieces(byte_level_tokenizer, token_ids) == ["", "\ufffd", "\ufffd", "\ufffda", "", "", "\ufffd"]


def test_a_byte_token_appears_with_its_character(byte_fallback_tokenizer: Tokenizer) -> None:
    letter = byte_fallback_tokenizer.vocab["b"]
    good = byte_tokens(byte_fallback_tokenizer, "é€\n".encode())
    assert pieces(byte_fallback_tokenizer, [letter, *good, letter]) == ["b", "", "é", "", "", "€", "\n", "b", ""]


def test_a_wrong_byte_appears_when_it_is_known_to_be_wrong(byte_fallback_tokenizer: Tokenizer) -> None:
    letter, the = (byte_fallback_tokenizer.vocab[token] for token in ("b", "▁the"))
    bad = byte_tokens(byte_fallback_tokenizer, "é".encode() + b"\xff\xe2\x82")
    assert pieces(byte_fallback_tokenizer, [*bad, the]) == ["", "é", "\ufffd", "", "", "\ufffd\ufffd the", ""]
    assert pieces(byte_fallback_tokenizer, [letter, *bad]) == ["b", "", "é", "\ufffd", "", "", "\ufffd\ufffd"]


def test_an_answer_goes_on_where_its_prompt_ends(byte_fallback_tokenizer: Tokenizer) -> None:
    tokenizer = byte_fallback_tokenizer
    the, bos = tokenizer.vocab["▁the"], tokenizer.vocab["<s>"]
    for prompt, answer in (
        (tokenizer.encode("a fox"), " the"),
        ([bos], "the"),
        ([bos, *byte_tokens(tokenizer, b"\x80" * 300)], " the"),
        ([*tokenizer.encode("a fox"), *[bos] * 300], " the"),
    ):
        detokenizer = IncrementalDetokenizer(tokenizer, prompt)
        assert detokenizer.push([the]) == answer
    first, second = byte_tokens(tokenizer, "é".encode())
    assert IncrementalDetokenizer(tokenizer, [the, first]).push([second]) == "é"


def test_text_before_a_byte_run_does_not_wait_for_it(byte_fallback_tokenizer: Tokenizer) -> None:
    letter = byte_fallback_tokenizer.vocab["b"]
    half = byte_tokens(byte_fallback_tokenizer, "é".encode()[:1])
    assert IncrementalDetokenizer(byte_fallback_tokenizer).push([letter, letter, *half]) == "bb"


def test_only_the_first_space_of_a_text_is_dropped(byte_fallback_tokenizer: Tokenizer) -> None:
    the = byte_fallback_tokenizer.vocab["▁the"]
    space = byte_fallback_tokenizer.vocab["▁"]
    assert pieces(byte_fallback_tokenizer, [the] * 40) == ["the", *[" the"] * 39, ""]
    assert pieces(byte_fallback_tokenizer, [space, the, space]) == ["", " the", " ", ""]
    assert "".join(pieces(byte_fallback_tokenizer, [space] * 50)) == " " * 49


def test_special_tokens_are_silent(byte_level_tokenizer: Tokenizer) -> None:
    bos, eos = (byte_level_tokenizer.vocab[token] for token in ("<s>", "</s>"))
    first, second, third = byte_tokens(byte_level_tokenizer, "€".encode())
    assert pieces(byte_level_tokenizer, [bos, first, eos, second, bos, third, eos]) == ["", "", "", "", "", "€", "", ""]
    assert byte_level_tokenizer.token_kind(bos) is TokenKind.SILENT
    assert byte_level_tokenizer.token_kind(10**9) is TokenKind.SILENT
    assert byte_level_tokenizer.token_kind(-1) is TokenKind.SILENT


class WordDecoder:
    """Token 0 has no text; any other is a space and its number. The space that starts a text is dropped."""

    anchor = ()

    def byte_value(self, token_id: int) -> int:
        raise NotImplementedError

    def text_of(self, token_ids: Sequence[int]) -> str:
        return "".join(f" {token_id}" for token_id in token_ids if token_id).removeprefix(" ")

    def token_kind(self, token_id: int) -> TokenKind:
        return TokenKind.TEXT

    def whole_text(self, token_id: int) -> str | None:
        return None


@given(token_ids=st.lists(st.sampled_from([0, 0, 0, 0, 0, 0, 0, 0, 7]), max_size=200))
@example(token_ids=[7] + [0] * 30 + [7])
def test_tokens_without_text_do_not_hide_the_start_of_the_text(token_ids: list[int]) -> None:
    decoder, out = WordDecoder(), []
    detokenizer = IncrementalDetokenizer(decoder)
    for token_id in token_ids:
        out.append(detokenizer.push([token_id]))
    assert "".join([*out, detokenizer.finish()]) == decoder.text_of(token_ids)


class CountingDecoder:
    """A tokenizer that counts the tokens it is asked to decode."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.num_decoded = 0
        self.anchor = tokenizer.anchor
        self.byte_value = tokenizer.byte_value
        self.whole_text = tokenizer.whole_text

    def text_of(self, token_ids: Sequence[int]) -> str:
        self.num_decoded += len(token_ids)
        return self.tokenizer.text_of(token_ids)

    def token_kind(self, token_id: int) -> TokenKind:
        return self.tokenizer.token_kind(token_id)


def test_the_work_per_token_does_not_grow(byte_level_tokenizer: Tokenizer, byte_fallback_tokenizer: Tokenizer) -> None:
    for tokenizer in (byte_level_tokenizer, byte_fallback_tokenizer):
        for data in (b"plain", "日本語".encode(), b"\xff", b"\x80\xe2", "é".encode() + b"\xc3"):
            counter = CountingDecoder(tokenizer)
            detokenizer = IncrementalDetokenizer(counter)
            token_ids = byte_tokens(tokenizer, data * (4000 // len(data)))
            for token_id in token_ids:
                detokenizer.push([token_id])
            detokenizer.finish()
            assert counter.num_decoded < 20 * len(token_ids)
