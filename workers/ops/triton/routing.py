"""The kernel of `workers.layers.moe.routing.route`: from logits to experts and weights in one launch.

Experts are chosen one after the other by keys of 64 bits: above, the bits of the score in an order of whole numbers;
below, the expert's number from behind. No two are the same, so of equal scores that of the smaller number is chosen,
and whatever the scores are, even NaN, k different experts are.
"""
# ruff: noqa: N803, N806  # compile-time constants are upper case, as is usual in Triton

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from attention.ops.triton.dependent_launch import dependent_launch
from attention.ops.triton.launch import on_device
from workers.ops.router_config import SMALLEST_SUM, RouterConfig

MAX_EXPERTS = 1024
"""Whose logits a program has in its registers."""


@triton.jit
def _keys(scores: tl.tensor, index: tl.tensor, there: tl.tensor) -> tl.tensor:
    """int64 that are ordered as the scores and, of equal ones, against the index; of what is not there, the least."""
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)
    least: tl.constexpr = -(2**63)
    return tl.where(there, keys, least)


@triton.jit
def _index(key: tl.tensor) -> tl.tensor:
    """The index of `_keys`."""
    return (0x7FFFFFFF - (key & 0x7FFFFFFF)).to(tl.int32)


@triton.jit
def _scores(logits: tl.tensor, CORRECTED: tl.constexpr, SIGMOID: tl.constexpr, LIMITED: tl.constexpr) -> tl.tensor:
    """What experts are chosen by, but for a correction: the logits where their order is that of the scores."""
    return 1.0 / (1.0 + tl.exp(-logits)) if SIGMOID and (CORRECTED or LIMITED) else logits


@triton.jit
def _open_groups(
    logits_ptr: tl.tensor,
    correction_ptr: tl.tensor | None,
    group: tl.tensor,
    SIGMOID: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    TOP_K_GROUPS: tl.constexpr,
    SUM_OF_TWO: tl.constexpr,
) -> tl.tensor:
    """Whether each of `group` is among the token's groups."""
    row = tl.arange(0, PADDED_GROUPS)
    column = tl.arange(0, PADDED_SIZE)
    there = (row < NUM_GROUPS)[:, None] & (column < GROUP_SIZE)[None, :]
    expert = row[:, None] * GROUP_SIZE + column[None, :]
    logits = tl.load(logits_ptr + expert, mask=there, other=0.0).to(tl.float32)
    scores = _scores(logits, correction_ptr is not None, SIGMOID, True)
    if correction_ptr is not None:
        scores += tl.load(correction_ptr + expert, mask=there, other=0.0).to(tl.float32)
    scores = tl.where(there, scores, float("-inf"))
    best = tl.max(scores, axis=1)
    if SUM_OF_TWO:
        at = tl.min(tl.where(scores == best[:, None], column[None, :], PADDED_SIZE), axis=1)
        best += tl.max(tl.where(column[None, :] == at[:, None], float("-inf"), scores), axis=1)
    keys = _keys(best, row, row < NUM_GROUPS)
    is_open = group < 0
    for _ in tl.static_range(TOP_K_GROUPS):
        chosen = _index(tl.max(keys, axis=0))
        is_open = is_open | (group == chosen)
        keys = _keys(best, row, (row < NUM_GROUPS) & (row != chosen) & (keys != -(2**63)))
    return is_open


@triton.jit
def route_kernel(
    ids_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    logits_ptr: tl.tensor,
    correction_ptr: tl.tensor | None,
    NUM_EXPERTS: tl.constexpr,
    PADDED_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    PADDED_K: tl.constexpr,
    NUM_SHARED: tl.constexpr,
    GATED: tl.constexpr,
    KIND: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    SMALLEST: tl.constexpr,
    SCALE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    TOP_K_GROUPS: tl.constexpr,
    SUM_OF_TWO: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program: one token's experts, the shared ones and then the best first, with their weights."""
    SIGMOID: tl.constexpr = KIND == "sigmoid"
    LIMITED: tl.constexpr = TOP_K_GROUPS < NUM_GROUPS
    GROUP_SIZE: tl.constexpr = NUM_EXPERTS // NUM_GROUPS
    token = tl.program_id(0).to(tl.int64)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    expert = tl.arange(0, PADDED_EXPERTS)
    there = expert < NUM_EXPERTS
    logits_ptr += token * (NUM_EXPERTS + 1 if GATED else NUM_EXPERTS)
    logits = tl.load(logits_ptr + expert, mask=there, other=float("-inf")).to(tl.float32)
    scores = _scores(logits, correction_ptr is not None, SIGMOID, LIMITED)
    if correction_ptr is not None:
        scores += tl.load(correction_ptr + expert, mask=there, other=0.0).to(tl.float32)
    keys = _keys(scores, expert, there)
    if LIMITED:
        is_open = _open_groups(
            logits_ptr,
            correction_ptr,
            expert // GROUP_SIZE,
            SIGMOID,
            NUM_GROUPS,
            PADDED_GROUPS,
            GROUP_SIZE,
            PADDED_SIZE,
            TOP_K_GROUPS,
            SUM_OF_TWO,
        )
        keys = tl.where(is_open, keys, -(2**63))
    place = tl.arange(0, PADDED_K)
    ids = tl.zeros([PADDED_K], tl.int32)
    chosen_logits = tl.full([PADDED_K], float("-inf"), tl.float32)
    for i in tl.static_range(TOP_K):
        best = _index(tl.max(keys, axis=0))
        ids = tl.where(place == NUM_SHARED + i, NUM_SHARED + best, ids)
        chosen_logits = tl.where(
            place == NUM_SHARED + i, tl.sum(tl.where(expert == best, logits, 0.0), axis=0), chosen_logits
        )
        keys = tl.where(expert == best, -(2**63), keys)
    if SIGMOID:
        weights = 1.0 / (1.0 + tl.exp(-chosen_logits))
    else:
        if KIND == "softmax":
            largest = tl.max(logits, axis=0)
            total = tl.sum(tl.exp(logits - largest), axis=0)
        else:
            largest = tl.max(chosen_logits, axis=0)
            total = tl.sum(tl.exp(chosen_logits - largest), axis=0)
        weights = tl.exp(chosen_logits - largest) / total
    weights = tl.where((place >= NUM_SHARED) & (place < NUM_SHARED + TOP_K), weights, 0.0)
    if RENORMALIZE:
        weights = weights / (tl.sum(weights, axis=0) + SMALLEST)
    weights *= SCALE
    if NUM_SHARED > 0:
        is_shared = place < NUM_SHARED
        ids = tl.where(is_shared, place, ids)
        shared_weight = 1.0
        if GATED:
            shared_weight = 1.0 / (1.0 + tl.exp(-tl.load(logits_ptr + NUM_EXPERTS).to(tl.float32)))
        weights = tl.where(is_shared, shared_weight, weights)
    ALL: tl.constexpr = TOP_K + NUM_SHARED
    tl.store(ids_ptr + token * ALL + place, ids.to(ids_ptr.dtype.element_ty), mask=place < ALL)
    tl.store(weights_ptr + token * ALL + place, weights, mask=place < ALL)


def launch_route(
    ids: torch.Tensor,
    weights: torch.Tensor,
    logits: torch.Tensor,
    config: RouterConfig,
    correction_bias: torch.Tensor | None,
    num_shared: int = 0,
) -> None:
    """Choose into `ids` and `weights`; `workers.layers.moe.routing.route` checks the arguments.

    Args:
        ids: (T, S + k) of an integer dtype, contiguous.
        weights: (T, S + k) float32, contiguous.
        logits: (T, E), or (T, E + 1) with the gate of the shared experts, contiguous; E at most `MAX_EXPERTS`.
        config: the family's router.
        correction_bias: (E,), contiguous, or None.
        num_shared: S experts before the E, which every token goes to: with weight 1, or the sigmoid of the gate.
    """
    num_tokens = logits.shape[0]
    if num_tokens == 0:
        return
    grouped = config.limits_groups
    with on_device(logits):
        route_kernel[(num_tokens,)](
            ids,
            weights,
            logits,
            correction_bias,
            NUM_EXPERTS=config.num_experts,
            PADDED_EXPERTS=triton.next_power_of_2(config.num_experts),
            TOP_K=config.top_k,
            PADDED_K=triton.next_power_of_2(config.top_k + num_shared),
            NUM_SHARED=num_shared,
            GATED=logits.shape[1] > config.num_experts,
            KIND=config.scores,
            RENORMALIZE=config.renormalize and config.scores != "softmax_of_chosen",
            SMALLEST=SMALLEST_SUM if config.scores == "sigmoid" else 0.0,
            SCALE=config.scaling_factor,
            NUM_GROUPS=config.num_groups if grouped else 1,
            PADDED_GROUPS=triton.next_power_of_2(config.num_groups),
            PADDED_SIZE=triton.next_power_of_2(config.experts_per_group),
            TOP_K_GROUPS=config.top_k_groups if grouped else 1,
            SUM_OF_TWO=config.group_score == "sum_of_two",
            num_warps=1 if config.num_experts <= 256 else 4,
            **dependent_launch(logits.device, num_tokens),
        )
