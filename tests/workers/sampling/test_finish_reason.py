"""When a sequence ends."""

from __future__ import annotations

import pytest

from workers.messages import FinishReason
from workers.sampling.state import SamplingState, finish_reason
from workers.sampling_params import SamplingParams
from workers.token_ids import as_token_ids

EOS = 2
STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH


def state(output: list[int], prompt_len: int = 4, window: int = 100, **params: object) -> SamplingState:
    sampling = SamplingParams(seed=0, **params)  # type: ignore[arg-type]
    return SamplingState(sampling, as_token_ids(range(10, 10 + prompt_len)), frozenset({EOS, 3}), window, output)


@pytest.mark.parametrize(
    ("output", "params", "expected"),
    [
        ([], {}, None),
        ([7], {}, None),
        ([7, EOS], {}, STOP),
        ([7, 3], {}, STOP),
        ([EOS, 7], {}, None),
        ([7, EOS], {"ignore_eos": True}, None),
        ([7, 9], {"stop_token_ids": (9,)}, STOP),
        ([7, 9], {"stop_token_ids": (9,), "ignore_eos": True}, STOP),
        ([7, EOS], {"stop_token_ids": (EOS,), "ignore_eos": True}, STOP),
        ([7, 8], {"max_tokens": 2}, LENGTH),
        ([7], {"max_tokens": 2}, None),
        ([7], {"max_tokens": 1}, LENGTH),
        ([7, EOS], {"max_tokens": 2}, STOP),
        ([7, EOS], {"max_tokens": 2, "ignore_eos": True}, LENGTH),
        ([7, 8, EOS], {"min_tokens": 2}, STOP),
        ([7, EOS], {"min_tokens": 2}, None),
        ([7, EOS], {"min_tokens": 2, "max_tokens": 2}, LENGTH),
    ],
)
def test_table(output: list[int], params: dict[str, object], expected: FinishReason | None) -> None:
    assert finish_reason(state(output, **params)) is expected


@pytest.mark.parametrize(("prompt_len", "expected"), [(7, None), (8, LENGTH), (9, LENGTH)])
def test_the_context_window_ends_the_text(prompt_len: int, expected: FinishReason | None) -> None:
    assert finish_reason(state([7, 8], prompt_len=prompt_len, window=10)) is expected


def test_min_tokens_does_not_outgrow_the_context_window() -> None:
    assert finish_reason(state([7, 8], prompt_len=8, window=10, min_tokens=50)) is LENGTH


def test_a_state_without_a_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="seed"):
        SamplingState(SamplingParams(), as_token_ids((1,)), frozenset(), 10)
