"""What the conformance suite holds a backend to: when it may refuse, what it must write, and what it must not."""

from __future__ import annotations

import torch

from attention.backend import AttentionBackend
from attention.platform import Platform
from attention.spec import FP8, AttentionNeeds
from attention_inputs import LAYER, Inputs

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
"""Of the whole output's norm; of a token's and head's own norm and of single elements it is twice that."""


def check_refusal(
    backend: type[AttentionBackend], platform: Platform, needs: AttentionNeeds, refused: list[str]
) -> None:
    """What the table does not claim is refused; what it claims is refused for reasons of the backend's own only."""
    table, spec = backend.capabilities, needs.spec
    claimed = (
        any(support.kind is platform.kind and not support.refuse(platform) for support in table.devices)
        and needs.dtype in table.dtypes
        and table.head_sizes.accepts(spec.head_size)
        and (not spec.attn_type.cached or table.block_sizes.accepts(needs.block_size))
        and spec.attn_type in table.attention_types
        and (needs.phase is None or needs.phase in table.phases)
        and needs.all_features <= table.features
    )
    if claimed:
        assert refused == backend.refuse_more(platform, needs), "refused what its table claims"
    else:
        assert refused, "accepted what its table does not claim"
    for reason in refused:
        assert len(reason.split()) > 1, f"not a readable reason: {reason!r}"
        assert reason == reason.strip()
        assert "\n" not in reason
        assert "torch." not in reason
    assert len(set(refused)) == len(refused), "the same reason twice"


def check_output(output: torch.Tensor, expected: torch.Tensor) -> None:
    """Against the reference: no NaN, exact zeros where nothing is seen, and the norms of what differs."""
    assert output.shape == expected.shape
    assert torch.isfinite(output).all(), f"{(~torch.isfinite(output)).any(-1).any(-1).sum()} tokens are not finite"
    tolerance = TOLERANCE[output.dtype]
    difference = output.double() - expected
    whole = (difference.norm() / expected.norm().clamp_min(1e-30)).item()
    assert whole <= tolerance, f"the output is off by {whole:.2e} of its norm"
    size = expected.norm(dim=-1)
    assert not output[size == 0].any(), "a query that sees no key did not give zeros"
    rows = (difference.norm(dim=-1) / size.clamp_min(1e-30)).nan_to_num(0.0)
    worst = divmod(int(rows.argmax()), rows.shape[1])
    assert rows.max() <= 2 * tolerance, (
        f"token {worst[0]} head {worst[1]} is off by {rows.max().item():.2e} of its norm"
    )
    torch.testing.assert_close(output.double(), expected, rtol=2 * tolerance, atol=2 * tolerance)


def check_cache(inputs: Inputs, cache_after: torch.Tensor) -> None:
    """The new keys and values are in their slots, and not a byte is different anywhere else."""
    assert inputs.cache is not None
    written, wanted = inputs.cache.view(torch.uint8), cache_after.view(torch.uint8)
    if torch.equal(written, wanted):
        return
    block_size = inputs.cache.shape[3]
    blocks, offsets = inputs.common.slot_mapping // block_size, inputs.common.slot_mapping % block_size
    stored, right = (cache[LAYER][blocks, :, offsets] for cache in (written, wanted))
    written, wanted = written.clone(), wanted.clone()
    for cache in (written, wanted):
        cache[LAYER][blocks, :, offsets] = 0
    assert torch.equal(written, wanted), "the cache was changed outside the batch's slots"
    assert inputs.cache.dtype == FP8, "keys and values are not as they came in their slots"
    steps = (e4m3_rank(stored) - e4m3_rank(right)).abs()
    assert steps.max() <= 1, f"an FP8 number is {steps.max()} numbers away from the right one"
    assert steps.double().mean() <= 0.01, f"{steps.double().mean():.1%} of the FP8 numbers are rounded otherwise"


def e4m3_rank(numbers: torch.Tensor) -> torch.Tensor:
    """Where each number (as uint8) stands among all e4m3 numbers in ascending order, the two zeros as one."""
    magnitude = (numbers & 0x7F).int()
    return torch.where(numbers > 0x7F, -magnitude, magnitude)
