"""The bytes of tokens against the text that they were made of."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.text.tokenizer import Tokenizer

LOSSLESS = ("byte_level", "byte_fallback", "metaspace")


@pytest.mark.parametrize("kind", LOSSLESS)
def test_the_bytes_of_all_tokens_are_those_of_the_text(loaded: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = loaded[kind]

    @settings(max_examples=60, deadline=None)
    @given(text=st.text(alphabet="fox jumpsé日👍🏽\n ", min_size=1, max_size=20))
    def check(text: str) -> None:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if tokenizer.decode(ids).strip() != text.strip():
            return  # a vocabulary that cannot spell it
        joined = b"".join(map(tokenizer.token_bytes, ids)).decode()
        assert joined in (text, " " + text)  # SentencePiece begins every text with a space

    check()


def test_words_of_word_piece_have_the_space_before_them(loaded: dict[str, Tokenizer]) -> None:
    tokenizer = loaded["word_piece"]
    ids = tokenizer.encode("quick brown", add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode().split() == tokenizer.decode(ids).split()


def test_a_part_of_a_character_has_its_own_bytes(loaded: dict[str, Tokenizer]) -> None:
    tokenizer = loaded["byte_fallback"]
    ids = tokenizer.encode("Ж", add_special_tokens=False)[-2:]
    assert [tokenizer.token_bytes(i) for i in ids] == [b"\xd0", b"\x96"]


def test_special_tokens_are_as_they_are_spelled_and_unknown_ids_empty(loaded: dict[str, Tokenizer]) -> None:
    tokenizer = loaded["byte_level"]
    assert tokenizer.token_bytes(tokenizer.vocab["</s>"]) == b"</s>"
    assert tokenizer.token_bytes(10**6) == b""
    assert tokenizer.with_special_tokens.text_of([tokenizer.vocab["</s>"]]) == "</s>"
