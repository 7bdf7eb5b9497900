"""What a request asks of its answer's tokens, as the gateway checks and completes it."""

from __future__ import annotations

import pytest

from cluster.generation.restrictions import Restrictions, bad_words_token_ids
from workers.errors import InvalidRequestError
from workers.sampling_params import SamplingParams
from workers.structured_output import StructuredOutput


class WordTokenizer:
    """Words are tokens, another one behind a space; what it does not know is spelt."""

    def __init__(self) -> None:
        self.known = {
            "bad": (10,),
            " bad": (11,),
            "very bad": (12, 11),
            " very bad": (13, 11),
            "x": (14,),
            " x": (9, 14),
        }

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return list(self.known[text])


def restrictions() -> Restrictions:
    return Restrictions(None, WordTokenizer(), 20)  # type: ignore[arg-type]


def test_words_are_kept_out_as_in_vllm() -> None:
    """At the beginning and behind a space; the latter only where the space makes another first token of the word."""
    words = bad_words_token_ids(WordTokenizer(), ["bad", " very bad", "x"])  # type: ignore[arg-type]
    assert words == ((10,), (11,), (12, 11), (13, 11), (14,))


async def test_the_workers_get_words_as_tokens() -> None:
    resolved = await restrictions().resolve(SamplingParams(bad_words=("bad",), logit_bias=((3, 1.0),)))
    assert resolved.bad_words_token_ids == ((10,), (11,))
    assert resolved.logit_bias == ((3, 1.0),)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"logit_bias": ((20, 1.0),)}, "logit_bias token 20 is out of range: the vocabulary has 20 tokens"),
        ({"allowed_token_ids": (3, 21)}, "allowed_token_ids token 21 is out of range"),
        ({"stop_token_ids": (2**31,)}, "stop token 2147483648 is out of range"),
        ({"allowed_token_ids": (10, 11), "bad_words": ("bad",)}, "leave none of allowed_token_ids"),
        ({"allowed_token_ids": (3,), "min_tokens": 1, "stop_token_ids": (3,)}, "leave none of allowed_token_ids"),
        ({"structured_output": StructuredOutput.json_object()}, "takes no structured_output"),
    ],
)
async def test_what_is_wrong_is_refused(params: dict, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        await restrictions().resolve(SamplingParams(**params))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"logit_bias": ((3, 100.5),)}, r"a logit_bias is 100.5, it must be in \[-100.0, 100.0\]"),
        ({"logit_bias": ((3, float("nan")),)}, "a logit_bias is nan"),
        ({"bad_words": ("  ",)}, "a text in bad_words is empty"),
        ({"bad_words": ("a",) * 1025}, "bad_words has 1025 entries, at most 1024 are allowed"),
    ],
)
def test_limits_are_named(params: dict, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        SamplingParams(**params)
