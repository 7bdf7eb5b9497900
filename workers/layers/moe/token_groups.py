"""Pairs of a token and one of its experts, sorted by expert: what every grouped product works on."""

from __future__ import annotations

import torch

_USUAL_ROWS = 16


class TokenGroups:
    """T tokens with k experts each make N = T * k pairs; pair number t * k + j is token t with its j-th expert.

    Sorted when somebody asks for it: of one token every pair is a group of its own, whose order matters to nobody.

    Args:
        ids: (T, k) of an integer dtype, each from 0 to `num_experts` - 1; no two of a row the same.
        num_experts: E.
        num_shared: how many of them, the first ones, every token goes to.
    """

    def __init__(self, ids: torch.Tensor, num_experts: int, num_shared: int = 0) -> None:
        self.ids = ids
        self.num_experts = num_experts
        self.num_shared = num_shared
        self._sorted: tuple[torch.Tensor, torch.Tensor] | None = None
        self._tiles: dict[int, torch.Tensor] = {}

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.ids.shape[0]

    @property
    def top_k(self) -> int:
        """k."""
        return self.ids.shape[1]

    @property
    def num_pairs(self) -> int:
        """N."""
        return self.ids.numel()

    @property
    def pairs(self) -> torch.Tensor:
        """(N,) int32: the pairs' numbers, those of expert 0 first; of one expert in the order of their tokens."""
        return self._sort()[0]

    @property
    def offsets(self) -> torch.Tensor:
        """(E + 1,) int32: where in `pairs` each expert's begin; the last is N."""
        return self._sort()[1]

    @property
    def tokens(self) -> torch.Tensor:
        """(N,) int32: whose the pairs are, in the order of `pairs`."""
        return self.pairs // self.top_k

    def tiles(self, rows: int) -> torch.Tensor:
        """The groups in tiles of `rows`, as `launch_tile_map` of `workers.ops.triton.token_groups` makes them."""
        if rows not in self._tiles:
            from workers.ops.triton.token_groups import launch_tile_map

            offsets = self._sort(rows)[1]
            if rows not in self._tiles:
                self._tiles[rows] = launch_tile_map(offsets, self.num_pairs, rows)
        return self._tiles[rows]

    def _sort(self, rows: int = _USUAL_ROWS) -> tuple[torch.Tensor, torch.Tensor]:
        """Pairs and offsets, once; where a kernel sorts, with tiles of `rows`, which come for nothing."""
        if self._sorted is None:
            if self.ids.is_cuda:
                from workers.ops.triton.token_groups import launch_group_tokens

                pairs, offsets, self._tiles[rows] = launch_group_tokens(self.ids, self.num_experts, rows)
                self._sorted = pairs, offsets
            else:
                self._sorted = sort_pairs(self.ids, self.num_experts)
        return self._sorted


def group_tokens(ids: torch.Tensor, num_experts: int, num_shared: int = 0) -> TokenGroups:
    """Pairs to be sorted by expert; on a GPU without waiting for it.

    Args:
        ids: (T, k) of an integer dtype, each from 0 to `num_experts` - 1.
        num_experts: E.
        num_shared: how many of them, the first ones, every token goes to.

    Raises:
        ValueError: ids that are no matrix of integers, or on the CPU one that is no expert.
    """
    if ids.dim() != 2 or ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"ids of {ids.dtype} {tuple(ids.shape)}: needs (tokens, experts of a token) int32 or int64")
    if not ids.is_cuda and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < num_experts:
        raise ValueError(f"expert ids from {int(ids.min())} to {int(ids.max())} of {num_experts} experts")
    return TokenGroups(ids, num_experts, num_shared)


def sort_pairs(ids: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`pairs` and `offsets` of `TokenGroups` in plain torch, on any device."""
    experts, pairs = ids.reshape(-1).sort(stable=True)
    bounds = torch.arange(num_experts + 1, dtype=experts.dtype, device=ids.device)
    offsets = torch.searchsorted(experts, bounds, out_int32=True)
    return pairs.int(), offsets
