"""Random numbers that depend on (seed, index of the token, vocabulary entry) and on nothing else.

There is no generator to carry: the noise for output token i of a request is computed from its seed and i. So it is
the same whatever else is in the batch, in whatever row, in whatever process, and a sequence can change workers
between two tokens. The integer part is exact, hence the same on every device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

# SplitMix64: Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014; the finaliser's
# constants are Stafford's "Mix13". Output n of the stream with state s is mix(s + n × GAMMA).
_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = 0x94D049BB133111EB
_MASK = 2**64 - 1

_CHUNK_ELEMENTS = 2**22
"""Entries made at once: bounds the 64-bit temporaries at some tens of MB."""


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * _MULTIPLIER_1) & _MASK
    x = ((x ^ (x >> 27)) * _MULTIPLIER_2) & _MASK
    return x ^ (x >> 31)


def noise_key(seed: int, index: int) -> int:
    """The state, 64 bits, of the random stream of output token `index` of a request with this seed."""
    return _mix((_mix((seed + _GAMMA) & _MASK) + (index + 1) * _GAMMA) & _MASK)


def gumbel_noise(keys: Sequence[int], vocab_size: int, device: torch.device) -> torch.Tensor:
    """Standard Gumbel noise, -ln(E) with E exponential: float32 (len(keys), vocab_size).

    argmax(ln p + noise) is a draw from p: the Gumbel-max trick (Gumbel 1954; Maddison, Tarlow, Minka, "A* Sampling",
    2014).

    Args:
        keys: a `noise_key` per row.
        vocab_size: V.
        device: where to compute it.
    """
    states = torch.tensor([_signed(key) for key in keys], dtype=torch.int64, device=device).unsqueeze(1)
    steps = torch.arange(1, vocab_size + 1, dtype=torch.int64, device=device) * _signed(_GAMMA)
    noise = torch.empty(len(keys), vocab_size, dtype=torch.float32, device=device)
    rows = max(1, _CHUNK_ELEMENTS // vocab_size)
    for out, state in zip(noise.split(rows), states.split(rows), strict=True):
        out.copy_(_random_bits(state + steps))
        # 53 random bits to the middle of one of 2**53 intervals of (0, 1). float32 resolves small values finely,
        # and those are what decides an argmax; only the upper end needs a guard against rounding to 1.
        out.add_(0.5).mul_(2.0**-53).clamp_(max=1.0 - 2.0**-24)
        out.neg_().log1p_().neg_().log_().neg_()
    return noise


def _random_bits(x: torch.Tensor) -> torch.Tensor:
    """53 random bits for each state in `x`, which is overwritten. int64 arithmetic wraps like uint64."""
    x.bitwise_xor_(_shift(x, 30)).mul_(_signed(_MULTIPLIER_1))
    x.bitwise_xor_(_shift(x, 27)).mul_(_signed(_MULTIPLIER_2))
    x.bitwise_xor_(_shift(x, 31))
    return _shift(x, 11)


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift: torch shifts int64 arithmetically."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x
