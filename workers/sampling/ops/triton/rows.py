"""What the kernels that choose tokens share: a row's parameters, its scores, their order, and its noise."""
# ruff: noqa: N803  # compile-time constants are upper case, as is usual in Triton

from __future__ import annotations

import triton
import triton.language as tl

from workers.sampling.ops import noise, penalties, row_params
from workers.sampling.ops.filters import MASS_UNIT

_WORDS = tl.constexpr(row_params.WORDS)
_STREAM, _PROMPT_LEN, _MIN_TOKENS = (
    tl.constexpr(word) for word in (row_params.STREAM, row_params.PROMPT_LEN, row_params.MIN_TOKENS)
)
_SLOT, _TOP_K, _LOGPROBS = (tl.constexpr(word) for word in (row_params.SLOT, row_params.TOP_K, row_params.LOGPROBS))
_BIAS_SLOT, _MASKED = tl.constexpr(row_params.BIAS_SLOT), tl.constexpr(row_params.MASKED)
_TEMPERATURE, _TOP_P, _LOG_MIN_P = (
    tl.constexpr(word) for word in (row_params.TEMPERATURE, row_params.TOP_P, row_params.LOG_MIN_P)
)
_REPETITION, _FREQUENCY, _PRESENCE = (
    tl.constexpr(word) for word in (row_params.REPETITION, row_params.FREQUENCY, row_params.PRESENCE)
)
_PROMPT, _STOP, _OUTPUT = (tl.constexpr(kind) for kind in (penalties.PROMPT, penalties.STOP, penalties.OUTPUT))
_UNITS = tl.constexpr(1.0 / MASS_UNIT)
_GAMMA = tl.constexpr(noise.signed(noise.GAMMA))
_MULTIPLIER_1 = tl.constexpr(noise.signed(noise.MULTIPLIER_1))
_MULTIPLIER_2 = tl.constexpr(noise.signed(noise.MULTIPLIER_2))
_NO_BOUND = tl.constexpr(float("-inf"))


@triton.jit
def is_asking(words_ptr: tl.tensor, tokens_ptr: tl.tensor, row: tl.tensor, RAW: tl.constexpr) -> tl.tensor:
    """Whether the row has a token, and wants more than the most likely one. `RAW`: wants log-probabilities."""
    words = words_ptr + row * _WORDS
    if RAW:
        asks = tl.load(words + _LOGPROBS) >= 0
    else:
        temperature = tl.load(words + _TEMPERATURE).to(tl.float32, bitcast=True)
        asks = (temperature > 0.0) | (tl.load(words + _SLOT) >= 0)
        asks = asks | (tl.load(words + _BIAS_SLOT) >= 0) | (tl.load(words + _MASKED) != 0)
    return asks & (tl.load(tokens_ptr + row) >= 0)


@triton.jit
def filters_of(words_ptr: tl.tensor, row: tl.tensor, RAW: tl.constexpr) -> tl.tensor:
    """(1 / temperature, top-k, top-p, ln(min-p)); none in a greedy row. `RAW`: those of its log-probabilities."""
    words = words_ptr + row * _WORDS
    if RAW:
        return 1.0, tl.load(words + _LOGPROBS), 1.0, _NO_BOUND
    temperature = tl.load(words + _TEMPERATURE).to(tl.float32, bitcast=True)
    drawn = temperature > 0.0
    top_k = tl.where(drawn, tl.load(words + _TOP_K), 0)
    top_p = tl.where(drawn, tl.load(words + _TOP_P).to(tl.float32, bitcast=True), 1.0)
    log_min_p = tl.where(drawn, tl.load(words + _LOG_MIN_P).to(tl.float32, bitcast=True), _NO_BOUND)
    return tl.div_rn(1.0, tl.where(drawn, temperature, 1.0)), top_k, top_p, log_min_p


@triton.jit
def is_filtered(top_k: tl.tensor, top_p: tl.tensor, log_min_p: tl.tensor) -> tl.tensor:
    """Whether these, of `filters_of`, drop any token."""
    return (top_k > 0) | (top_p < 1.0) | (log_min_p > float("-inf"))


@triton.jit
def is_drawn(words_ptr: tl.tensor, row: tl.tensor) -> tl.tensor:
    """Whether the row is not greedy."""
    return tl.load(words_ptr + row * _WORDS + _TEMPERATURE).to(tl.float32, bitcast=True) > 0.0


@triton.jit
def row_scores(
    logits_ptr: tl.tensor,
    stride: tl.tensor,
    marks_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    masks_ptr: tl.tensor,
    words_ptr: tl.tensor,
    seq_lens_ptr: tl.tensor,
    row: tl.tensor,
    V: tl.constexpr,
    RAW: tl.constexpr,
) -> tl.tensor:
    """What `scores_of` takes.

    Where the row's logits and marks are, whether it has any, and what they cost; then where its biases are and whether
    it has any, and the same of its mask.
    """
    words = words_ptr + row * _WORDS
    logits = logits_ptr + row * stride
    if RAW:
        return logits, marks_ptr, False, False, 1.0, 0.0, 0.0, bias_ptr, False, masks_ptr, False
    bias_slot = tl.load(words + _BIAS_SLOT)
    bias = bias_ptr + bias_slot.to(tl.int64) * V
    masked = tl.load(words + _MASKED) != 0
    allowed = masks_ptr + row * ((V + 31) // 32)
    slot = tl.load(words + _SLOT)
    banned = num_output(words_ptr, seq_lens_ptr, row) < tl.load(words + _MIN_TOKENS)
    repetition = tl.load(words + _REPETITION).to(tl.float32, bitcast=True)
    frequency = tl.load(words + _FREQUENCY).to(tl.float32, bitcast=True)
    presence = tl.load(words + _PRESENCE).to(tl.float32, bitcast=True)
    marks = marks_ptr + slot.to(tl.int64) * V
    biased = bias_slot >= 0
    return logits, marks, slot >= 0, banned, repetition, frequency, presence, bias, biased, allowed, masked


@triton.jit
def num_output(words_ptr: tl.tensor, seq_lens_ptr: tl.tensor, row: tl.tensor) -> tl.tensor:
    """The row's output tokens before the one that is chosen."""
    return tl.load(seq_lens_ptr + row) - tl.load(words_ptr + row * _WORDS + _PROMPT_LEN) - 1


@triton.jit
def scores_of(source: tl.tensor, token_id: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """The scores of some tokens, see `restrict` and `apply_marks`.

    Minus infinity where `mask` is not set, and no minus zero.
    """
    logits, marks_ptr, marked, banned, repetition, frequency, presence, bias, biased, allowed, masked = source
    score = tl.load(logits + token_id, mask=mask, other=float("-inf")).to(tl.float32)
    if biased:
        score += tl.load(bias + token_id, mask=mask, other=0.0)
    if masked:
        word = tl.load(allowed + token_id // 32, mask=mask, other=0)
        score = tl.where(((word >> (token_id % 32)) & 1) != 0, score, float("-inf"))
    if marked:
        marks = tl.load(marks_ptr + token_id, mask=mask, other=0)
        score = tl.where(banned & ((marks & _STOP) != 0), float("-inf"), score)
        divided = tl.where(score > 0.0, tl.div_rn(score, repetition + tl.zeros_like(score)), score * repetition)
        score = tl.where((marks & ~_STOP) != 0, divided, score)
        count = (marks // _OUTPUT).to(tl.float32)
        score = score - frequency * count - presence * (count > 0.0).to(tl.float32)
    return tl.where(score == 0.0, 0.0, score)


@triton.jit
def order_key(score: tl.tensor) -> tl.tensor:
    """An integer for each score, in the same order."""
    bits = score.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def mass_of(relative: tl.tensor) -> tl.tensor:
    """`token_mass`."""
    return (tl.exp(relative) * _UNITS).to(tl.int64)


@triton.jit
def nucleus_mass(total: tl.tensor, top_p: tl.tensor) -> tl.tensor:
    """The least mass that reaches this part of all, and of one token."""
    exact = total.to(tl.float64) * top_p.to(tl.float64)
    needed = exact.to(tl.int64)
    return tl.maximum(needed + (needed.to(tl.float64) < exact).to(tl.int64), 1)


@triton.jit
def _mix(x: tl.tensor) -> tl.tensor:
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MULTIPLIER_1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _MULTIPLIER_2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def noise_key(words_ptr: tl.tensor, seq_lens_ptr: tl.tensor, row: tl.tensor) -> tl.tensor:
    """See `workers.sampling.ops.noise.noise_keys`."""
    words = words_ptr + row * _WORDS + _STREAM
    stream = (tl.load(words + 1).to(tl.int64) << 32) | (tl.load(words).to(tl.int64) & 0xFFFFFFFF)
    return _mix(stream + (num_output(words_ptr, seq_lens_ptr, row).to(tl.int64) + 1) * _GAMMA)


@triton.jit
def gumbel(key: tl.tensor, token_id: tl.tensor) -> tl.tensor:
    """Noise for some tokens, see `sampling.ops.noise.gumbel_noise`: the same bits, float32 logarithms of its own.

    Where u is small, 1 - u has lost its low bits, and E = -ln(1 - u) = 2 artanh(u / (2 - u)) comes from its series.
    What is left are a few roundings: E differs from the twin's by a few units in the last place.
    """
    bits = (_mix(key + (token_id.to(tl.int64) + 1) * _GAMMA) >> 11) & 0x1FFFFFFFFFFFFF
    u = tl.minimum((bits.to(tl.float32) + 0.5) * 1.1102230246251565e-16, 0.99999994)
    s = u / (2.0 - u)
    q = s * s
    series = 2.0 * s * (1.0 + q * (0.33333334 + q * (0.2 + q * (0.14285715 + q * (0.11111111 + q * 0.09090909)))))
    exponential = tl.where(u < 0.25, series, -tl.log(1.0 - u))
    return -tl.log(exponential)
