"""Blocks of every format as numbers: those that were quantised, within a block's precision, and any part of them."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from gguf_files import blocks
from workers.loading.gguf.storage import GgufBlocks, OneAdded, is_dequantized

QUANTIZED = {Type.Q8_0: 127, Type.Q5_0: 15, Type.Q5_1: 15, Type.Q4_0: 7, Type.Q4_1: 7}
"""Formats, and into how many steps they divide the largest number of a block at least."""


@pytest.mark.parametrize("kind", QUANTIZED)
def test_numbers_are_those_that_were_quantised(kind: Type) -> None:
    numbers = np.random.default_rng(0).standard_normal((6, 96)).astype(np.float32)
    storage = GgufBlocks(kind.name)
    values = torch.from_numpy(gguf.quantize(numbers, kind))
    assert values.shape == storage.values_shape((6, 96))
    found = storage.dequantize(values, None, ((0, 6), (0, 96)), torch.float32)
    largest = torch.from_numpy(np.abs(numbers.reshape(6, 3, 32)).max(-1)).repeat_interleave(32, dim=1)
    assert (found - torch.from_numpy(numbers)).abs().le(largest / QUANTIZED[kind] + 1e-3).all()


def test_q4_k_by_its_definition() -> None:
    """Eight groups of 32 numbers: d * scale * q - dmin * min, with scales and mins of 6 bits packed in 12 bytes."""
    (raw,) = blocks(Type.Q4_K, 1, 256, seed=3)
    d, dmin = (float(x) for x in raw[:4].view(np.float16))
    scales, quants, expected = [int(x) for x in raw[4:16]], raw[16:], np.empty(256)
    for group in range(8):
        if group < 4:
            scale, low = scales[group] & 63, scales[group + 4] & 63
        else:
            scale = (scales[group + 4] & 15) | (scales[group - 4] >> 6 << 4)
            low = (scales[group + 4] >> 4) | (scales[group] >> 6 << 4)
        packed = quants[group // 2 * 32 : group // 2 * 32 + 32]
        expected[group * 32 : group * 32 + 32] = d * scale * (packed >> 4 if group % 2 else packed & 15) - dmin * low
    found = GgufBlocks("Q4_K").dequantize(torch.from_numpy(raw[None]), None, ((0, 1), (0, 256)), torch.float32)
    np.testing.assert_allclose(found[0].numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [Type.Q4_1, Type.Q6_K])
def test_a_part_is_that_part_of_the_whole(kind: Type) -> None:
    storage, columns = GgufBlocks(kind.name), 3 * gguf.GGML_QUANT_SIZES[kind][0]
    raw = blocks(kind, 8, columns) if kind == Type.Q6_K else gguf.quantize(np.ones((8, columns), np.float32), kind)
    whole = storage.dequantize(torch.from_numpy(raw), None, ((0, 8), (0, columns)), torch.float32)
    for region in (((2, 5), (0, columns)), ((0, 8), (columns // 2, columns)), ((7, 8), (5, columns // 2 + 1))):
        (top, bottom), (left, right) = storage.values_region(region)
        part = torch.from_numpy(raw[top:bottom, left:right].copy())
        found = storage.dequantize(part, None, region, torch.float32)
        (top, bottom), (left, right) = region
        assert torch.equal(found, whole[top:bottom, left:right])


def test_one_is_taken_from_norms_before_they_are_rounded() -> None:
    stored = torch.tensor([1.001, 0.75, 2.0])
    found = OneAdded().dequantize(stored, None, ((0, 3),), torch.bfloat16)
    assert torch.equal(found, torch.tensor([stored[0].item() - 1, -0.25, 1.0]).bfloat16())
    assert stored[2] == 2.0


def test_which_formats_are_read() -> None:
    assert all(is_dequantized(name) for name in ("Q2_K", "Q3_K", "Q5_K", "IQ4_XS", "IQ2_S", "TQ1_0"))
    assert not is_dequantized("Q8_1")
