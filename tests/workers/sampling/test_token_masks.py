"""Which tokens a sequence may go on with: grammars, bad words and the rules for the end of a text together."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from workers.grammars.compiler import GrammarCompiler
from workers.grammars.vocabulary import vocabulary_of
from workers.messages import FinishReason
from workers.sampling.state import SamplingState, finish_reason
from workers.sampling.token_masks import token_masks
from workers.sampling_params import SamplingParams
from workers.structured_output import StructuredOutput
from workers.token_ids import as_token_ids

A, B, AB, EOS, OTHER_EOS = range(5)
VOCAB_SIZE = 5


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    rust = Tokenizer(models.BPE(vocab={"a": A, "b": B, "ab": AB}, merges=[]))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens(["</s>", "<other>"])
    return GrammarCompiler(lambda: vocabulary_of(rust.to_str(), VOCAB_SIZE, (EOS, OTHER_EOS)))


@pytest.fixture
def state(compiler):
    def make(output: list[int], regex: str | None = None, **params: object) -> SamplingState:
        wanted = None if regex is None else StructuredOutput.regex(regex)
        sampling = SamplingParams(seed=0, structured_output=wanted, **params)  # type: ignore[arg-type]
        ends = frozenset({EOS, OTHER_EOS})
        return SamplingState(sampling, as_token_ids((A,)), ends, 100, output, compiler.matcher(wanted))

    return make


def allowed(state: SamplingState) -> set[int]:
    (bits,) = token_masks([state], VOCAB_SIZE)
    return {token for token in range(VOCAB_SIZE) if int(bits[0]) >> token & 1}


@pytest.mark.parametrize(
    ("output", "regex", "params", "expected"),
    [
        ([], "a+b", {}, {A, AB}),
        ([A], "a+b", {}, {A, B, AB}),
        ([AB], "a+b", {}, {EOS, OTHER_EOS}),
        ([A], "a+", {}, {A, EOS, OTHER_EOS}),
        # End-of-sequence is ignored as long as the grammar goes on.
        ([A], "a+", {"ignore_eos": True}, {A}),
        ([AB], "a+b", {"ignore_eos": True}, {EOS, OTHER_EOS}),
        # So it is before min_tokens.
        ([A], "a+", {"min_tokens": 2}, {A}),
        ([A, A], "a+", {"min_tokens": 2}, {A, EOS, OTHER_EOS}),
        ([AB], "a+b", {"min_tokens": 2}, {EOS, OTHER_EOS}),
        # A stop token may come where the text may end, or where the grammar wants it.
        ([A], "a+", {"stop_token_ids": (B,)}, {A, B, EOS, OTHER_EOS}),
        ([A], "a+b", {"stop_token_ids": (B,), "min_tokens": 3}, {A, AB}),
        ([A], "ab", {"stop_token_ids": (B,), "min_tokens": 3}, {B}),
        # Bad words.
        ([A], None, {"bad_words_token_ids": ((A, B),)}, {A, AB, EOS, OTHER_EOS}),
        ([B], None, {"bad_words_token_ids": ((A, B),)}, {A, B, AB, EOS, OTHER_EOS}),
        ([A, A], None, {"bad_words_token_ids": ((A, A, AB), (A, EOS))}, {A, B, AB, OTHER_EOS} - {AB}),
        ([A], "a+b", {"bad_words_token_ids": ((A, A), (AB,))}, {B}),
        ([A], None, {"bad_words_token_ids": ((B, B),), "min_tokens": 2}, {A, B, AB}),
        # Together.
        ([A], "a+b?", {"allowed_token_ids": (A, EOS)}, {A, EOS}),
    ],
)
def test_what_may_come_next(state, output, regex, params, expected) -> None:
    assert allowed(state(output, regex, **params)) == expected


def test_where_nothing_is_left_the_reason_is_known(state) -> None:
    made = state([A], "a+b", allowed_token_ids=(EOS,))
    assert allowed(made) == set()
    assert "leave no token" in made.nothing_left
    lost = state([B], "a+b")
    assert allowed(lost) == set()
    assert "structured_output" in lost.nothing_left


def test_a_sequence_that_has_ended_may_do_anything(state) -> None:
    """It has run a step too many, and its token is dropped."""
    assert allowed(state([AB, EOS], "a+b")) == set(range(VOCAB_SIZE))


@pytest.mark.parametrize(
    ("params", "expected"),
    [({}, FinishReason.STOP), ({"ignore_eos": True}, FinishReason.STOP), ({"min_tokens": 9}, FinishReason.STOP)],
)
def test_the_end_of_a_grammar_is_the_end_of_the_text(state, params, expected) -> None:
    """Its end-of-sequence token came only because nothing else could."""
    assert finish_reason(state([AB, EOS], "a+b", **params)) is expected
    assert finish_reason(state([AB], "a+b", **params)) is None
