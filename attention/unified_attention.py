"""`torch.ops.baton.unified_attention`: attention as one opaque operator, so that `torch.compile(fullgraph=True)` works.

The operator takes tensors and the layer's name; everything else comes from `forward_context`.
"""

from __future__ import annotations

import torch

from attention.forward_context import current_context


@torch.library.custom_op("baton::unified_attention", mutates_args=("output",))
def unified_attention(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    output: torch.Tensor,
    layer_name: str,
) -> None:
    """Run the attention layer of that name, hooks included, and write its result to `output`.

    Args:
        query: (T, Hq, D).
        key: (Tk, Hkv, D); None when all keys are in the cache.
        value: (Tk, Hkv, D), or None with `key`.
        output: (T, Hq, D), written.
        layer_name: the layer in the current `ForwardContext`.
    """
    context = current_context()
    context.layers[layer_name].attend(context, query, key, value, output)


@unified_attention.register_fake
def _fake(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    output: torch.Tensor,
    layer_name: str,
) -> None:
    return None
