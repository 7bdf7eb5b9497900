"""A package's kernel run on a few tokens: to know that it works before it is chosen, and to compile what a layer needs.

A package can be installed and importable, and lack the kernels for the device, or bring them for another PyTorch.
"""

from __future__ import annotations

import functools

import torch

from attention.backends.flash_attn.calls import Call, Kernel
from attention.broken import in_a_line
from attention.selection.reference import reference_attention
from attention.spec import AttentionSpec

_PLAIN = AttentionSpec(num_heads=4, num_kv_heads=1, head_size=128, scale=128**-0.5)
_LENS = (5, 130)
_TOLERANCE = 4e-2
"""Of bfloat16, as where backends are measured."""


@functools.cache
def kernel_fault(kernel: Kernel, device: torch.device) -> str | None:
    """What goes wrong with a plain causal layer's packed keys in bfloat16 on a CUDA device; None when nothing does."""
    try:
        call = small_call(_PLAIN, torch.bfloat16, device)
        call.output.fill_(float("nan"))
        kernel(call)
        parts = [tensor.split(_LENS) for tensor in (call.query, call.key, call.value)]
        expected = torch.cat([reference_attention(_PLAIN, q, k, v) for q, k, v in zip(*parts, strict=True)])
        error = (call.output.float() - expected).abs().max().item()
    except Exception as failure:  # libraries raise whatever they like
        return in_a_line(failure)
    return None if error <= _TOLERANCE else f"wrong numbers: off by {error:.2g}, {_TOLERANCE:g} are allowed"


@functools.cache
def compile_kernels(
    kernel: Kernel, spec: AttentionSpec, dtype: torch.dtype, page: tuple[int, int] | None, device: torch.device
) -> None:
    """Run a layer's kernels once, so that those that are compiled then are there when the first prompt comes.

    Args:
        kernel: a package's.
        spec: the layer.
        dtype: of queries.
        page: tokens in a page and in a block of the cache, where the kernel reads it in pages.
        device: where the layer runs.
    """
    kernel(small_call(spec, dtype, device))
    if page is not None:
        kernel(small_call(spec, dtype, device, page))


def small_call(
    spec: AttentionSpec, dtype: torch.dtype, device: torch.device, page: tuple[int, int] | None = None
) -> Call:
    """Two short sequences of such a layer, random, all of their keys new; with `page` these are read from a cache."""
    generator = torch.Generator(device).manual_seed(0)
    tokens, longest = sum(_LENS), max(_LENS)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    query = draw(tokens, spec.num_heads, spec.head_size)
    begins = torch.tensor([0, _LENS[0], tokens], dtype=torch.int32, device=device)
    key, value = draw(2, tokens, spec.num_kv_heads, spec.head_size).unbind(0)
    seq_lens, tables = begins.diff(), None
    if page is not None:
        size, block = page
        pages = -(-longest // size)
        cache = draw(2 * pages, 2, block, spec.num_kv_heads, spec.head_size)
        key, value = cache[:, 0, :size], cache[:, 1, :size]
        tables = torch.arange(2 * pages, dtype=torch.int32, device=device).view(2, pages)
    reach = -1 if spec.sliding_window is None else spec.sliding_window - 1
    return Call(
        query=query,
        key=key,
        value=value,
        output=torch.empty_like(query),
        cu_seqlens_q=begins,
        cu_seqlens_k=begins,
        max_query_len=longest,
        max_seq_len=longest,
        seq_lens=seq_lens,
        block_tables=tables,
        scale=spec.scale,
        causal=spec.causal,
        window=(reach, 0 if spec.causal and reach >= 0 else reach),
        soft_cap=spec.logits_soft_cap or 0.0,
        alibi_slopes=None,
        sinks=draw(spec.num_heads).float() if spec.has_sinks else None,
        wants_lse=False,
    )
