"""Random numbers that depend on (seed, index of the token, vocabulary entry) and on nothing else.

There is no generator to carry: the noise for output token i of a request is computed from its seed and i. So it is
the same whatever else is in the batch, in whatever row, in whatever process, and a sequence can change workers
between two tokens. The integer part is exact, hence the same on every device.
"""

from __future__ import annotations

import torch

# SplitMix64: Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014; the finaliser's
# constants are Stafford's "Mix13". Output n of the stream with state s is mix(s + n × GAMMA).
GAMMA = 0x9E3779B97F4A7C15
MULTIPLIER_1 = 0xBF58476D1CE4E5B9
MULTIPLIER_2 = 0x94D049BB133111EB
_MASK = 2**64 - 1

_CHUNK_ELEMENTS = 2**22
"""Entries made at once: bounds the 64-bit temporaries at some tens of MB."""


def noise_stream(seed: int) -> int:
    """What the noise of a request with this seed starts from: 64 bits, without a sign."""
    x = (seed + GAMMA) & _MASK
    x = ((x ^ (x >> 30)) * MULTIPLIER_1) & _MASK
    x = ((x ^ (x >> 27)) * MULTIPLIER_2) & _MASK
    return x ^ (x >> 31)


def noise_keys(streams: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The state of the random stream of output token `indices` of each request: int64 (N,), the bits of 64.

    Args:
        streams: int64 (N,), bits of `noise_stream`.
        indices: integer (N,), how many output tokens come before.
    """
    return _mix_(streams + (indices.long() + 1) * signed(GAMMA))


def gumbel_noise(keys: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Standard Gumbel noise, -ln(E) with E exponential: float32 (N, vocab_size).

    argmax(ln p + noise) is a draw from p: the Gumbel-max trick (Gumbel 1954; Maddison, Tarlow, Minka, "A* Sampling",
    2014).

    Args:
        keys: int64 (N,), of `noise_keys`.
        vocab_size: V.
    """
    steps = torch.arange(1, vocab_size + 1, dtype=torch.int64, device=keys.device) * signed(GAMMA)
    noise = torch.empty(len(keys), vocab_size, dtype=torch.float32, device=keys.device)
    rows = max(1, _CHUNK_ELEMENTS // vocab_size)
    for out, key in zip(noise.split(rows), keys.unsqueeze(1).split(rows), strict=True):
        out.copy_(_shift(_mix_(key + steps), 11))
        # 53 random bits to the middle of one of 2**53 intervals of (0, 1). float32 resolves small values finely,
        # and those are what decides an argmax; only the upper end needs a guard against rounding to 1.
        out.add_(0.5).mul_(2.0**-53).clamp_(max=1.0 - 2.0**-24)
        out.neg_().log1p_().neg_().log_().neg_()
    return noise


def _mix_(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser, in place. int64 arithmetic wraps like uint64."""
    x.bitwise_xor_(_shift(x, 30)).mul_(signed(MULTIPLIER_1))
    x.bitwise_xor_(_shift(x, 27)).mul_(signed(MULTIPLIER_2))
    return x.bitwise_xor_(_shift(x, 31))


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift: torch shifts int64 arithmetically."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def signed(x: int) -> int:
    """64 bits as torch's int64 reads them."""
    return x - 2**64 if x >= 2**63 else x
