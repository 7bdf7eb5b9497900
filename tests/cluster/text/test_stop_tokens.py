"""A stop string that is a special token is that token."""

from __future__ import annotations

import pytest

from cluster.text.stop_tokens import stop_token_ids
from workers.errors import InvalidRequestError
from workers.sampling_params import SamplingParams

SPECIAL = {"</s>": 2, "<|end|>": 9}


def test_a_stop_string_that_is_a_special_token_stands_for_it() -> None:
    sampling = SamplingParams(stop=("<|end|>", "x"), stop_token_ids=(5,))
    assert stop_token_ids(sampling, SPECIAL) == (5, 9)
    assert stop_token_ids(SamplingParams(stop="</s>", stop_token_ids=(2,)), SPECIAL) == (2,)


@pytest.mark.parametrize("stop", ["</s>\n", "a<|end|>", "</s></s>"])
def test_a_stop_string_that_no_text_has_is_refused(stop: str) -> None:
    with pytest.raises(InvalidRequestError, match="special token"):
        stop_token_ids(SamplingParams(stop=(stop,)), SPECIAL)
