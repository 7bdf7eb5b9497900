"""The experts' matrices of one projection, whatever they are stored as.

A format that is to stay quantised in memory (FP8 with block scales, MXFP4) is a class of its own here; the ways to
compute a grouped product say which classes they read (`grouped_linear`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812


class GroupedWeight(ABC):
    """E linear maps of K inputs to M outputs."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """(E, M, K), of the numbers that are meant, not of what holds them."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of what they multiply and of the product."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where they are."""

    @property
    def bias(self) -> torch.Tensor | None:
        """(E, M) of `dtype`, where there is one to be added."""
        return None

    @abstractmethod
    def linear(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        """(n, K) of `dtype` to (n, M): one expert's map, with its bias. All that a way without a kernel needs."""


@dataclass(frozen=True)
class PlainWeight(GroupedWeight):
    """Matrices in the dtype that they are multiplied in.

    Attributes:
        weight: (E, M, K), contiguous.
        added: (E, M) of the same dtype, contiguous, or None.

    Raises:
        ValueError: shapes or dtypes that do not fit each other.
    """

    weight: torch.Tensor
    added: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.weight.dim() != 3 or not self.weight.is_contiguous():
            raise ValueError(
                f"weight of shape {tuple(self.weight.shape)} with strides {self.weight.stride()}: "
                "needs (experts, outputs, inputs), contiguous"
            )
        if self.added is not None and (
            self.added.shape != self.weight.shape[:2]
            or self.added.dtype != self.weight.dtype
            or not self.added.is_contiguous()
        ):
            raise ValueError(
                f"bias of {self.added.dtype} {tuple(self.added.shape)} for weights of {self.weight.dtype} "
                f"{tuple(self.weight.shape)}"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, M, K)."""
        num_experts, num_outputs, num_inputs = self.weight.shape
        return num_experts, num_outputs, num_inputs

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight."""
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        """Of the weight."""
        return self.weight.device

    @property
    def bias(self) -> torch.Tensor | None:
        """(E, M), where there is one."""
        return self.added

    def linear(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        """(n, K) to (n, M)."""
        return F.linear(x, self.weight[expert], None if self.added is None else self.added[expert])
