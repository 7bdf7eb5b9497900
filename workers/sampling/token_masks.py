"""Which tokens may come next in sequences whose tokens so far say so, as bits, made on the host.

A mask needs the sequence's last token. It is made while the forward pass that computes the logits still runs on the
device, so it costs time only where it takes longer than that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from workers.grammars.matcher import fill_masks
from workers.sampling.ops.restrictions import WORD_BITS, num_words
from workers.sampling.state import SamplingState, finish_reason

Bits = npt.NDArray[np.int32]


def token_masks(states: Sequence[SamplingState], vocab_size: int) -> Bits:
    """The masks of sequences that are `masked`: int32 (n, ⌈V / 32⌉), see `TokenMatcher.fill`.

    Args:
        states: n sequences, all tokens known. Of one that has ended everything may come: its token is dropped.
        vocab_size: V.
    """
    masks = np.full((len(states), num_words(vocab_size)), -1, dtype=np.int32)
    going_on = [(row, state) for row, state in enumerate(states) if finish_reason(state) is None]
    fill_masks([(row, s.matcher, s.output_token_ids) for row, s in going_on if s.matcher is not None], masks)
    for row, state in going_on:
        _allow_ends(state, masks[row])
        _rule_out(state, masks[row])
        _go_on(state, masks[row])
        if not masks[row].any():
            state.nothing_left = _why_nothing(state)
    return masks


def _why_nothing(state: SamplingState) -> str:
    if state.matcher is not None and state.matcher.error is not None:
        return f"the answer cannot go on in the form that structured_output asks for: {state.matcher.error}"
    return "structured_output, allowed_token_ids and bad_words together leave no token that may come next"


def _rule_out(state: SamplingState, bits: Bits) -> None:
    """The last token of a bad word may not follow its others, as in vLLM; and what biases rule out, too.

    The latter so that it is known here if nothing is left.
    """
    output, params = state.output_token_ids, state.params
    if params.allowed_token_ids:
        allowed = np.zeros_like(bits)
        _set(allowed, params.allowed_token_ids)
        bits &= allowed
    for *begin, last in params.bad_words_token_ids:
        if not begin or output[-len(begin) :] == begin:
            _clear(bits, (last,))


def _allow_ends(state: SamplingState, bits: Bits) -> None:
    """Where a grammar is complete the text may end by any token that ends texts, not only by those of the model."""
    if state.matcher is not None and state.matcher.accepting and _long_enough(state):
        _set(bits, state.stop_ids)


def _go_on(state: SamplingState, bits: Bits) -> None:
    """Keep out what would end the text before `min_tokens`, and end-of-sequence if it is ignored.

    Where a grammar is complete and nothing else is left it ends all the same.
    """
    long_enough = _long_enough(state)
    kept_out = frozenset[int]() if long_enough else state.stop_ids
    if state.matcher is not None:
        kept_out |= state.eos_token_ids - state.stop_ids if long_enough else state.eos_token_ids
    if kept_out:
        before = bits.copy()
        _clear(bits, kept_out)
        if not bits.any():
            bits[:] = before


def _long_enough(state: SamplingState) -> bool:
    return len(state.output_token_ids) >= state.params.min_tokens


def _clear(bits: Bits, token_ids: Iterable[int]) -> None:
    for token_id in token_ids:
        if 0 <= token_id < len(bits) * WORD_BITS:
            bits[token_id // WORD_BITS] &= ~_bit(token_id)


def _set(bits: Bits, token_ids: Iterable[int]) -> None:
    for token_id in token_ids:
        if 0 <= token_id < len(bits) * WORD_BITS:
            bits[token_id // WORD_BITS] |= _bit(token_id)


def _bit(token_id: int) -> np.int32:
    return np.array([1 << (token_id % WORD_BITS)], dtype=np.uint32).view(np.int32)[0]  # type: ignore[no-any-return]
