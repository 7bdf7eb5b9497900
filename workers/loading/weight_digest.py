"""A digest of a model's parameters that costs about as much as reading them once, the same on every device."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Protocol

import torch

_WORDS = 2**20
"""Of 8 bytes, summed up at a time: what is needed beside the parameter is a few times that."""
_SEED = 0x6B76


class LazyNumbers(Protocol):
    """What stands for a tensor that does not exist as such: its numbers are made a part at a time."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensor."""

    @property
    def device(self) -> torch.device:
        """Where parts are made."""

    @property
    def nbytes(self) -> int:
        """Of the tensor."""

    def part(self, begin: int, end: int) -> torch.Tensor:
        """Elements in row-major order; both bounds multiples of 1024, or `end` the number of all elements."""


def weight_digest(parameters: Iterable[tuple[str, torch.Tensor | LazyNumbers]]) -> str:
    """The digest of named tensors, in order of their names: 32 hexadecimal digits.

    Of each run of words the sum of word · multiplier modulo 2^64 is taken where the tensor lies, with odd multipliers
    that differ from place to place: any single word that differs changes it, and words that change places do, too
    (multilinear hashing: Lemire and Kaser, "Strongly universal string hashing is fast", arXiv:1202.4961). BLAKE2b over
    names, shapes, dtypes and sums makes one digest of them. It finds other weights, not an attacker's.

    Args:
        parameters: names, and contiguous tensors of any dtype and device, or what stands for such.
    """
    running = hashlib.blake2b(digest_size=16)
    multipliers: dict[torch.device, torch.Tensor] = {}
    in_order = sorted(parameters, key=lambda named: named[0])
    longest = min(_WORDS, max((tensor.nbytes // 8 for _, tensor in in_order), default=0))
    for name, tensor in in_order:
        if tensor.device not in multipliers:
            multipliers[tensor.device] = _multipliers(longest).to(tensor.device)
        running.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        running.update(_sums(tensor, multipliers[tensor.device]))
    return running.hexdigest()


def _sums(tensor: torch.Tensor | LazyNumbers, multipliers: torch.Tensor) -> bytes:
    """Of each run its sum, 8 bytes little-endian, and the bytes at the end that fill no word."""
    sums, rest = [], b""
    for data in _runs(tensor):
        num_words = data.numel() // 8
        if num_words:
            sums.append((data[: num_words * 8].view(torch.int64) * multipliers[:num_words]).sum())
        if data.numel() % 8:
            rest = bytes(data[num_words * 8 :].tolist())
    return (torch.stack(sums).cpu().numpy().astype("<i8").tobytes() if sums else b"") + rest


def _runs(tensor: torch.Tensor | LazyNumbers) -> Iterator[torch.Tensor]:
    """The bytes of so many words at a time; none of an empty tensor."""
    if isinstance(tensor, torch.Tensor):
        data = tensor.detach().contiguous().view(-1).view(torch.uint8)
        yield from data.split(8 * _WORDS) if data.numel() else ()
        return
    itemsize = tensor.dtype.itemsize
    count, step = tensor.nbytes // itemsize, 8 * _WORDS // itemsize
    for begin in range(0, count, step):
        yield tensor.part(begin, min(count, begin + step)).view(torch.uint8)


def _multipliers(count: int) -> torch.Tensor:
    """The first of them, which are the same for every `count`."""
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randint(-(2**63), 2**63 - 1, (count,), dtype=torch.int64, generator=generator) | 1
