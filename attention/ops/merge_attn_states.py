"""Joining attention over two sets of keys into attention over both, by log-sum-exp.

Let o_a be the output over the keys A and l_a the logarithm of its softmax's denominator, and likewise for B. Then the
output over A and B is (exp(l_a) o_a + exp(l_b) o_b) / (exp(l_a) + exp(l_b)), and its logarithm log(exp(l_a) + exp(l_b))
(section 2.2 of arXiv:2501.01005).
"""

from __future__ import annotations

import torch

from attention.errors import AttentionInputError
from attention.ops.dispatch import uses_triton


def merge_attn_states(
    output: torch.Tensor,
    a: torch.Tensor,
    a_lse: torch.Tensor,
    b: torch.Tensor,
    b_lse: torch.Tensor,
    *,
    output_lse: torch.Tensor | None = None,
) -> None:
    """Merge with the Triton kernel where Triton runs, else in plain torch.

    Args:
        output: (T, Hq, D), written; may be `a` or `b`.
        a: (T, Hq, D), attention over some keys.
        a_lse: (T, Hq) float32, the natural logarithm of its softmax's denominator; -inf where no key was seen (`a` is
            not read there, and may hold anything).
        b: (T, Hq, D), attention over other keys.
        b_lse: (T, Hq) float32, likewise.
        output_lse: (T, Hq) float32, written when given; may be `a_lse` or `b_lse`.

    Raises:
        AttentionInputError: shapes that do not belong together.
    """
    if not (output.shape == a.shape == b.shape and a_lse.shape == b_lse.shape == output.shape[:2]):
        raise AttentionInputError(
            f"cannot merge {tuple(a.shape)} with lse {tuple(a_lse.shape)} and {tuple(b.shape)} with lse "
            f"{tuple(b_lse.shape)} into {tuple(output.shape)}"
        )
    if uses_triton(output):
        from attention.ops.triton.merge_attn_states import merge_attn_states as kernel

        kernel(output, a, a_lse, b, b_lse, output_lse=output_lse)
        return
    merged, lse = merge_states(torch.stack((a, b)), torch.stack((a_lse, b_lse)))
    output.copy_(merged)
    if output_lse is not None:
        output_lse.copy_(lse)


def merge_states(outputs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge any number of states, in plain torch and float32.

    Args:
        outputs: (P, ..., D), attention over P sets of keys.
        lses: (P, ...) float32, natural logarithms of the denominators; -inf where no key was seen.

    Returns:
        (..., D) and (...), both float32; zeros and -inf where no set had a key.
    """
    lse = lses.logsumexp(0)
    weights = (lses - lse.masked_fill(lse == float("-inf"), 0.0)).exp_().unsqueeze(-1)
    return (outputs.float().masked_fill(weights == 0, 0.0) * weights).sum(0), lse


def apply_sinks(output: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Put a logit without value into every head's softmax, as gpt-oss does (arXiv:2309.17453).

    Args:
        output: (..., Hq, D).
        lse: (..., Hq) float32.
        sinks: (Hq,) float32.

    Returns:
        The output scaled down by the sink's share, and the denominator's logarithm with the sink in it.
    """
    return output * torch.sigmoid(lse - sinks).unsqueeze(-1), torch.logaddexp(lse, sinks)
