"""Grammars: what they let through token by token, what is refused at the door, and that it is bounded."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Callable

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from workers.errors import InvalidRequestError
from workers.grammars.compiler import Grammar, GrammarCompiler
from workers.grammars.matcher import TokenMatcher, fill_masks
from workers.grammars.vocabulary import vocabulary_of
from workers.structured_output import MAX_BYTES, StructuredOutput

TOKENS = ["a", "b", "ab", "aab", "ba", "1", "12", '"', '"a', "{", "}", "{}", ":", ",", "[", "]", '":']
EOS = len(TOKENS)
VOCAB_SIZE = EOS + 4
"""The model has more logits than the tokenizer tokens, as many have."""


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    """For a vocabulary of a few tokens, spelt out above, and one that ends a text."""
    rust = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(TOKENS)}, merges=[]))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens(["</s>"])
    return GrammarCompiler(lambda: vocabulary_of(rust.to_str(), VOCAB_SIZE, (EOS,)))


def allowed(matcher: TokenMatcher, output: list[int]) -> set[int]:
    masks = np.zeros((1, 1), dtype=np.int32)
    fill_masks([(0, matcher, output)], masks)
    return {token for token in range(VOCAB_SIZE) if int(masks[0, 0]) >> token & 1}


def texts(grammar: Grammar, num_tokens: int) -> set[str]:
    """Every complete text of so many tokens at most, by walking through the masks."""
    found, open_ends = set(), [[]]
    for _ in range(num_tokens + 1):
        longer = []
        for output in open_ends:
            for token in allowed(grammar.matcher(), output):
                if token == EOS:
                    found.add("".join(TOKENS[t] for t in output))
                else:
                    longer.append([*output, token])
        open_ends = longer
    return found


def every_text(num_tokens: int) -> set[str]:
    return {"".join(way) for n in range(num_tokens + 1) for way in itertools.product(TOKENS, repeat=n)}


def is_json(text: str, of_type: type) -> bool:
    try:
        return isinstance(json.loads(text), of_type)
    except ValueError:
        return False


FORMS: dict[str, tuple[StructuredOutput, Callable[[str], bool]]] = {
    "regex": (StructuredOutput.regex("a*b?1+"), lambda text: re.fullmatch("a*b?1+", text) is not None),
    "alternatives": (
        StructuredOutput.regex("(aab|ab){1,2}|12"),
        lambda text: re.fullmatch("(aab|ab){1,2}|12", text) is not None,
    ),
    "choice": (StructuredOutput.choice(["ab", "aab", "ab12", 'b"']), {"ab", "aab", "ab12", 'b"'}.__contains__),
    "gbnf": (StructuredOutput.grammar('root ::= "a" root "b" | "1"'), re.compile("1|a1b").fullmatch),
    "lark": (StructuredOutput.grammar('start: "a" start "b" | "1"'), re.compile("1|a1b").fullmatch),
    "string": (StructuredOutput.json_schema({"type": "string", "maxLength": 2}), lambda t: is_json(t, str)),
    "object": (StructuredOutput.json_object(), lambda text: is_json(text, dict)),
}


@pytest.mark.parametrize("form", FORMS)
def test_masks_let_exactly_the_texts_of_the_form_through(compiler: GrammarCompiler, form: str) -> None:
    """Against all texts of so many tokens, one by one. Fewer than 4: the tokens are few, their products many."""
    wanted, matches = FORMS[form]
    expected = {text for text in every_text(3) if matches(text)}
    if form == "string":
        expected = {text for text in expected if len(json.loads(text)) <= 2}
    assert expected
    assert texts(compiler.compile(wanted), 3) == expected


def test_sequences_do_not_touch_each_other(compiler: GrammarCompiler) -> None:
    grammar = compiler.compile(StructuredOutput.regex("a*b"))
    first, second = grammar.matcher(), grammar.matcher()
    allowed(first, [TOKENS.index("a"), TOKENS.index("ab")])
    assert first.accepting
    assert not second.accepting
    assert allowed(second, []) == {TOKENS.index(token) for token in ("a", "b", "ab", "aab")}


def test_many_masks_at_once_are_those_of_each(compiler: GrammarCompiler) -> None:
    grammar = compiler.compile(StructuredOutput.regex("(ab|12)*"))
    outputs = [[], [TOKENS.index("a")], [TOKENS.index("1")], [TOKENS.index("ab")]]
    masks = np.zeros((5, 1), dtype=np.int32)
    fill_masks([(row + 1, grammar.matcher(), output) for row, output in enumerate(outputs)], masks)
    for row, output in enumerate(outputs):
        assert {t for t in range(VOCAB_SIZE) if int(masks[row + 1, 0]) >> t & 1} == allowed(grammar.matcher(), output)
    assert masks[0, 0] == 0


def test_a_token_that_the_grammar_does_not_allow_is_an_error_that_stays(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(StructuredOutput.regex("ab")).matcher()
    assert allowed(matcher, [TOKENS.index("1")]) == set()
    assert matcher.error
    assert not matcher.accepting
    assert allowed(matcher, [TOKENS.index("1"), TOKENS.index("a")]) == set()


REFUSED = {
    "no json": (StructuredOutput.json_schema("{"), "json_schema"),
    "no schema": (StructuredOutput.json_schema('{"type": "strin"}'), "strin"),
    "unknown keyword": (StructuredOutput.json_schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
    "allows nothing": (StructuredOutput.json_schema(False), "not"),
    "remote reference": (StructuredOutput.json_schema({"$ref": "http://127.0.0.1:9/x"}), "127.0.0.1"),
    "exponential schema": (
        StructuredOutput.json_schema(
            {
                "allOf": [
                    {"anyOf": [{"type": "object", "properties": {f"{kind}{i}": {"type": "string"}}} for kind in "pq"]}
                    for i in range(16)
                ]
            }
        ),
        "large",
    ),
    "deep schema": (StructuredOutput.json_schema('{"items":' * 2000 + "{}" + "}" * 2000), "json_schema"),
    "no regex": (StructuredOutput.regex("(ab"), "regex"),
    "look-ahead": (StructuredOutput.regex("(?=a)ab"), "look-around"),
    "no grammar": (StructuredOutput.grammar('root ::= "a" | nowhere'), "nowhere"),
    "nonsense": (StructuredOutput.grammar("%%%"), "grammar"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_used_is_refused_with_the_reason(compiler: GrammarCompiler, case: str) -> None:
    wanted, reason = REFUSED[case]
    with pytest.raises(InvalidRequestError, match=re.escape(reason)) as first:
        compiler.compile(wanted)
    assert str(first.value).startswith(f"structured_output.{wanted.kind.value} ")
    assert len(str(first.value)) < 500
    assert compiler.has(wanted), "it is not worked on again"
    with pytest.raises(InvalidRequestError, match=re.escape(reason)):
        compiler.compile(wanted)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StructuredOutput.regex("a" * (MAX_BYTES + 1)), f"has {MAX_BYTES + 1} bytes, at most {MAX_BYTES}"),
        (lambda: StructuredOutput.regex(""), "is empty"),
        (lambda: StructuredOutput.choice([]), "at least one"),
        (lambda: StructuredOutput.choice(["a", ""]), "none may be empty"),
        (lambda: StructuredOutput.choice([str(i) for i in range(10_001)]), "has 10001 texts, at most 10000"),
        (lambda: StructuredOutput.json_schema({"a": object()}), "is not JSON"),
    ],
)
def test_limits_are_named(make: Callable[[], StructuredOutput], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        make()


def test_a_grammar_is_compiled_once_and_the_vocabulary_read_once() -> None:
    reads = []

    def load():
        reads.append(1)
        rust = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
        rust.decoder = decoders.ByteLevel()
        rust.add_special_tokens(["</s>"])
        return vocabulary_of(rust.to_str(), 2, (1,))

    compiler = GrammarCompiler(load)
    assert not reads
    wanted = StructuredOutput.regex("a+")
    assert compiler.compile(wanted) is compiler.compile(StructuredOutput.regex("a+"))
    compiler.compile(StructuredOutput.choice(["a"]))
    assert reads == [1]


def test_what_is_kept_is_bounded(compiler: GrammarCompiler) -> None:
    first = StructuredOutput.choice(["ab"])
    compiler.compile(first)
    for i in range(300):
        with contextlib.suppress(InvalidRequestError):  # what is refused is kept, too, and is quick
            compiler.compile(StructuredOutput.grammar(f"%{i}"))
    assert not compiler.has(first)


def test_a_vocabulary_without_an_end_is_refused() -> None:
    rust = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    with pytest.raises(ValueError, match=r"no token with an id in \[5\]"):
        vocabulary_of(rust.to_str(), 8, (5,))


def test_without_a_vocabulary_structured_output_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="takes no structured_output"):
        GrammarCompiler.without_vocabulary().compile(StructuredOutput.json_object())
