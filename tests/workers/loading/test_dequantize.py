"""Quantised weights as numbers again, against `transformers` and float64."""

from __future__ import annotations

import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from workers.loading.dequantize import dequantize_fp8_blocks, dequantize_mxfp4


def random_bytes(*shape: int, low: int = 0, high: int = 256, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_mxfp4_is_that_of_transformers(dtype: torch.dtype) -> None:
    blocks, scales = random_bytes(3, 10, 4, 16), random_bytes(3, 10, 4, low=90, high=140, seed=1)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=dtype)  # the other way around
    assert torch.equal(dequantize_mxfp4(blocks, scales, dtype), theirs.mT)


def test_every_mxfp4_number_times_every_scale() -> None:
    blocks = torch.arange(256, dtype=torch.uint8).view(16, 16)[:, None].expand(16, 255, 16).contiguous()
    scales = torch.arange(255, dtype=torch.uint8).expand(16, 255).contiguous()
    result = dequantize_mxfp4(blocks, scales, torch.float32).view(16, 255, 16, 2)

    def meant(bits: int) -> float:  # sign, two bits of exponent with a bias of 1, one of mantissa
        sign, exponent, mantissa = bits >> 3, bits >> 1 & 3, bits & 1
        size = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
        return -size if sign else size

    numbers = torch.tensor([[meant(byte & 15), meant(byte >> 4)] for byte in range(256)], dtype=torch.float64)
    powers = 2.0 ** (torch.arange(255, dtype=torch.float64) - 127)
    exact = numbers.view(16, 1, 16, 2) * powers[None, :, None, None]
    assert torch.equal(result, exact.float())
    assert dequantize_mxfp4(blocks[:1, :1], scales[:1, :1] + 255, torch.float32).isnan().all()


def test_mxfp4_that_does_not_fit_is_refused() -> None:
    blocks, scales = random_bytes(2, 3, 16), random_bytes(2, 3)
    with pytest.raises(ValueError, match=r"blocks of shape \(2, 3, 16\) with scales of \(2, 2\)"):
        dequantize_mxfp4(blocks, scales[:, :2], torch.float32)
    with pytest.raises(ValueError, match=r"blocks of shape \(2, 3, 15\)"):
        dequantize_mxfp4(blocks[..., :15], scales, torch.float32)
    with pytest.raises(ValueError, match=r"scales of torch\.int32"):
        dequantize_mxfp4(blocks, scales.int(), torch.float32)


def fp8(*shape: int) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 100).to(torch.float8_e4m3fn)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(256, 128), (130, 300), (5, 7)])
def test_fp8_blocks(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = fp8(*shape)
    scales = torch.rand(-(-shape[0] // 128), -(-shape[1] // 128), generator=torch.Generator().manual_seed(1))
    exact = weight.double()
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            exact[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128] *= scales[i, j].double()
    assert torch.equal(dequantize_fp8_blocks(weight, scales, dtype), exact.float().to(dtype))


@pytest.mark.parametrize("rows", [(0, 130), (40, 100), (126, 129), (128, 130)])
@pytest.mark.parametrize("columns", [(0, 300), (128, 256), (250, 260)])
def test_a_part_of_a_matrix_of_fp8_blocks(rows: tuple[int, int], columns: tuple[int, int]) -> None:
    weight, scales = fp8(130, 300), torch.rand(2, 3, generator=torch.Generator().manual_seed(1))
    whole = dequantize_fp8_blocks(weight, scales, torch.float32)
    touched = scales[rows[0] // 128 : (rows[1] + 127) // 128, columns[0] // 128 : (columns[1] + 127) // 128]
    part = weight[rows[0] : rows[1], columns[0] : columns[1]]
    result = dequantize_fp8_blocks(part, touched, torch.float32, first=(rows[0] % 128, columns[0] % 128))
    assert torch.equal(result, whole[rows[0] : rows[1], columns[0] : columns[1]])


def test_scales_may_be_powers_of_two() -> None:
    weight, exponents = fp8(128, 256), torch.tensor([[120, 130]], dtype=torch.uint8)
    result = dequantize_fp8_blocks(weight, exponents.view(torch.float8_e8m0fnu), torch.float32)
    assert torch.equal(result, dequantize_fp8_blocks(weight, 2.0 ** (exponents.float() - 127), torch.float32))


def test_fp8_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"scales of shape \(1, 2\) for \(2, 2\) blocks"):
        dequantize_fp8_blocks(fp8(130, 200), torch.ones(1, 2), torch.float32)
    with pytest.raises(ValueError, match="needs a matrix of float8_e4m3fn"):
        dequantize_fp8_blocks(torch.ones(2, 2), torch.ones(1, 1), torch.float32)
