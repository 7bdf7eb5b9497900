"""Experts whose weights stay in MXFP4, four bits and a quarter each, as gpt-oss was published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from workers.errors import CheckpointError, ConfigError
from workers.layers.linear_methods.base import empty_parameter
from workers.layers.moe.grouped_weight import GroupedWeight, PlainWeight
from workers.loading.dequantize import MXFP4_BLOCK
from workers.loading.mxfp4_numbers import Mxfp4Numbers
from workers.ops.mxfp4_words import BLOCK_WORDS, LARGEST_SCALE, dequantized_words, to_exponents, to_words


@dataclass(frozen=True)
class Mxfp4Weight(GroupedWeight):
    """Matrices in the order of `workers.ops.mxfp4_words`.

    Attributes:
        words: (E, G, M, 8) int16, contiguous, for 32 * G inputs.
        exponents: (E, ceil(G / 4), M) int32, contiguous.
        numbers: dtype of what they are multiplied with.
        added: (E, M) of that dtype, contiguous, or None.

    Raises:
        ValueError: shapes or dtypes that do not fit each other.
    """

    words: torch.Tensor
    exponents: torch.Tensor
    numbers: torch.dtype
    added: torch.Tensor | None = None

    def __post_init__(self) -> None:
        num_experts, num_blocks, num_outputs, in_block = self.words.shape
        fours = (num_experts, -(-num_blocks // 4), num_outputs)
        if in_block != BLOCK_WORDS or self.words.dtype != torch.int16 or not self.words.is_contiguous():
            raise ValueError(f"MXFP4 words of {self.words.dtype} {tuple(self.words.shape)}: needs int16 (E, G, M, 8)")
        if self.exponents.shape != fours or self.exponents.dtype != torch.int32 or not self.exponents.is_contiguous():
            raise ValueError(
                f"MXFP4 exponents of {self.exponents.dtype} {tuple(self.exponents.shape)}: needs int32 {fours}"
            )
        if self.added is not None and (
            self.added.shape != (num_experts, num_outputs)
            or self.added.dtype != self.numbers
            or not self.added.is_contiguous()
        ):
            raise ValueError(
                f"bias of {self.added.dtype} {tuple(self.added.shape)} for MXFP4 weights {self.shape} that are "
                f"multiplied in {self.numbers}"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, M, K)."""
        num_experts, num_blocks, num_outputs, _ = self.words.shape
        return num_experts, num_outputs, num_blocks * MXFP4_BLOCK

    @property
    def dtype(self) -> torch.dtype:
        """Of what they are multiplied with."""
        return self.numbers

    @property
    def device(self) -> torch.device:
        """Of the words."""
        return self.words.device

    @property
    def bias(self) -> torch.Tensor | None:
        """(E, M), where there is one."""
        return self.added

    @property
    def has_kernels(self) -> bool:
        """Whether kernels read it where it is."""
        return kernels_read_mxfp4(self.device, self.numbers)

    def linear(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        """(n, K) to (n, M)."""
        weight = dequantized_words(self.words[expert], self.exponents[expert], self.numbers)
        return F.linear(x, weight, None if self.added is None else self.added[expert])

    def dequantized(self) -> PlainWeight:
        """The same numbers in memory of their own, made by a kernel: exact in bfloat16."""
        from workers.ops.triton.mxfp4_linear import launch_dequantize_mxfp4

        weight = torch.empty(self.shape, dtype=self.numbers, device=self.device)
        launch_dequantize_mxfp4(weight, self.words, self.exponents)
        return PlainWeight(weight, self.added)


class Mxfp4GroupedLinear:
    """A loader fills `blocks`, (E, M, K / 32, 16), and `scales`, (E, M, K / 32), both uint8, and `bias`, (E, M)."""

    def create_weights(
        self, module: nn.Module, shape: tuple[int, int, int], bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Register what a checkpoint holds.

        Raises:
            ConfigError: 32 does not divide K.
        """
        num_experts, num_outputs, num_inputs = shape
        if num_inputs % MXFP4_BLOCK:
            raise ConfigError(f"MXFP4 keeps multiples of {MXFP4_BLOCK} inputs, not {num_inputs}")
        scales = (num_experts, num_outputs, num_inputs // MXFP4_BLOCK)
        module.register_parameter(
            "blocks", empty_parameter(*scales, MXFP4_BLOCK // 2, dtype=torch.uint8, device=device)
        )
        module.register_parameter("scales", empty_parameter(*scales, dtype=torch.uint8, device=device))
        module.register_parameter("bias", empty_parameter(*shape[:2], dtype=dtype, device=device) if bias else None)
        module.numbers_dtype = dtype  # type: ignore[assignment]

    def process_weights(self, module: nn.Module) -> None:
        """Bring them into the order that kernels read them in; after this there are no `blocks` and `scales`.

        Raises:
            CheckpointError: a scale that the kernels do not compute with.
        """
        blocks, scales = module.get_parameter("blocks").detach(), module.get_parameter("scales").detach()
        if kernels_read_mxfp4(blocks.device, _dtype_of(module)) and scales.numel():
            largest = int(scales.max())
            if largest > LARGEST_SCALE:
                raise CheckpointError(
                    f"an MXFP4 scale of 2^{largest - 127}: kernels compute with 2^{LARGEST_SCALE - 127} at most; with "
                    "expert_weights dequantized the experts are turned into plain weights"
                )
        module.exponents = to_exponents(scales)
        module.register_parameter("scales", None)
        module.words = to_words(blocks)
        module.register_parameter("blocks", None)

    def weight(self, module: nn.Module, with_bias: bool) -> Mxfp4Weight:
        """What was processed.

        Raises:
            ValueError: nothing was.
        """
        words, exponents, bias = getattr(module, "words", None), getattr(module, "exponents", None), module.bias
        if not isinstance(words, torch.Tensor) or not isinstance(exponents, torch.Tensor):
            raise ValueError("weights in MXFP4 are multiplied with after process_weights")
        added = bias.detach() if with_bias and isinstance(bias, torch.Tensor) else None
        return Mxfp4Weight(words, exponents, _dtype_of(module), added)

    def kept(self, module: nn.Module) -> Mapping[str, Mxfp4Numbers]:
        """Before they are processed: what the parameters mean, by the name of the plain one."""
        blocks, scales = module.get_parameter("blocks").detach(), module.get_parameter("scales").detach()
        return {"weight": Mxfp4Numbers(blocks, scales, _dtype_of(module))}


MXFP4 = Mxfp4GroupedLinear()


def kernels_read_mxfp4(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this device has kernels that multiply MXFP4 with activations of a dtype."""
    if device.type != "cuda":
        return False
    from workers.ops.triton.mxfp4_linear import computes_mxfp4

    return computes_mxfp4(device, dtype)


def _dtype_of(module: nn.Module) -> torch.dtype:
    dtype = module.numbers_dtype
    assert isinstance(dtype, torch.dtype)
    return dtype
