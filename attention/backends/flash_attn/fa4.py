"""FlashAttention 4, `flash_attn.cute` of flash-attn-4: compiled when it is first called, launched from Python.

The public function takes about 120 µs of the host a call: gradients' bookkeeping, checks, and a key of some sixty parts
to find the compiled kernel by; and it takes no output, which costs a copy. Where the version at hand has the function
behind it, that one is called, and from the second call of a kind on only its kernel (`replay`). Where it has not, or
looks different, the public function does it all.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from attention.backends.common.libraries import load_library
from attention.backends.flash_attn.calls import NAME, Call
from attention.backends.flash_attn.replay import Replays, WatchedKernels

MODULE = "flash_attn.cute.interface"
INNER = "_flash_attn_fwd"
"""The function behind the public one."""
_TAKEN = frozenset({
    "q", "k", "v", "out", "lse", "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "max_seqlen_q", "max_seqlen_k",
    "page_table", "softmax_scale", "causal", "softcap", "window_size_left", "window_size_right", "learnable_sink",
    "num_splits", "return_lse",
})  # fmt: skip
"""What the function behind the public one is passed."""
_ANY_LENGTH = 256
"""Queries of a sequence that are more than a tile for every group of heads. Kernels of SM 9.0 are the same for fewer,
but compiled once more where the library knows of fewer."""
_ALIGNMENT = 16


def flash_attn_4(splits: bool, call: Call) -> torch.Tensor | None:
    """Run a call with FlashAttention 4.

    Args:
        splits: whether the kernels of this device can divide one sequence's keys among processors, for decode.
        call: what to do.
    """
    return launcher_of(load_library("flash_attn_4", NAME, MODULE))(call, splits)


class Launcher:
    """The shortest way to the kernels that a version of the library offers.

    Attributes:
        inner: the function behind the public one; None: this version's takes something else.

    Args:
        library: `flash_attn.cute.interface`.
    """

    def __init__(self, library: Any) -> None:
        self._public: Callable[..., Any] = library.flash_attn_varlen_func
        self.inner: Callable[..., Any] | None = None
        self._replays: Replays | None = None
        inner = getattr(library, INNER, None)
        if callable(inner) and _parameters(inner) >= _TAKEN:
            self.inner = inner
            self._replays = _watched(inner)

    def __call__(self, call: Call, splits: bool) -> torch.Tensor | None:
        """Run a call; see `Kernel`."""
        num_splits = 0 if splits and call.max_query_len == 1 else 1
        longest = call.max_query_len if splits else max(call.max_query_len, _ANY_LENGTH)
        if self.inner is None or _has_gradient(call):
            return self._by_public(call, num_splits, longest)
        paged = call.block_tables is not None
        cu_seqlens_k, seq_lens = (None, call.seq_lens) if paged else (call.cu_seqlens_k, None)
        sinks = None if call.sinks is None else call.sinks.detach()
        lse = None
        if call.wants_lse:
            shape = (call.query.shape[1], call.query.shape[0])
            lse = torch.empty(shape, dtype=torch.float32, device=call.query.device)
        tensors = (
            call.query, call.key, call.value, call.output, lse,
            call.cu_seqlens_q, cu_seqlens_k, seq_lens, call.block_tables, sinks,
        )  # fmt: skip
        options = (call.scale, call.causal, call.window, call.soft_cap, longest, call.max_seq_len, num_splits)
        run = functools.partial(self._by_inner, call, num_splits, longest, lse, sinks)
        if self._replays is None or num_splits != 1:
            run()
        else:
            self._replays.launch(options, tensors, run)
        return lse

    def _by_inner(
        self, call: Call, num_splits: int, longest: int, lse: torch.Tensor | None, sinks: torch.Tensor | None
    ) -> None:
        assert self.inner is not None
        paged, direct = call.block_tables is not None, _is_aligned(call.output)
        left, right = _window(call)
        output = self.inner(
            call.query,
            call.key,
            call.value,
            cu_seqlens_q=call.cu_seqlens_q,
            cu_seqlens_k=None if paged else call.cu_seqlens_k,
            seqused_k=call.seq_lens if paged else None,
            max_seqlen_q=longest,
            max_seqlen_k=call.max_seq_len,
            page_table=call.block_tables,
            softmax_scale=call.scale,
            causal=call.causal,
            softcap=call.soft_cap,
            window_size_left=left,
            window_size_right=right,
            learnable_sink=sinks,
            num_splits=num_splits,
            return_lse=lse is not None,
            out=call.output if direct else None,
            lse=lse,
        )[0]
        if not direct:
            call.output.copy_(output)

    def _by_public(self, call: Call, num_splits: int, longest: int) -> torch.Tensor | None:
        paged = call.block_tables is not None
        output, lse = self._public(
            call.query,
            call.key,
            call.value,
            cu_seqlens_q=call.cu_seqlens_q,
            cu_seqlens_k=None if paged else call.cu_seqlens_k,
            max_seqlen_q=longest,
            max_seqlen_k=call.max_seq_len,
            seqused_k=call.seq_lens if paged else None,
            page_table=call.block_tables,
            softmax_scale=call.scale,
            causal=call.causal,
            window_size=_window(call),
            learnable_sink=call.sinks,
            softcap=call.soft_cap,
            num_splits=num_splits,
            return_lse=call.wants_lse,
        )
        call.output.copy_(output)
        return lse if call.wants_lse else None


launcher_of = functools.cache(Launcher)
"""The launcher of a module."""


def _window(call: Call) -> tuple[int | None, int | None]:
    left, right = (None if side < 0 else side for side in call.window)
    return left, right


def _has_gradient(call: Call) -> bool:
    return call.query.requires_grad or call.key.requires_grad or call.value.requires_grad


def _is_aligned(tensor: torch.Tensor) -> bool:
    """Whether the kernels can write to it."""
    *outer, last = tensor.stride()
    aligned = all(stride * tensor.element_size() % _ALIGNMENT == 0 for stride in outer)
    return last == 1 and aligned and tensor.data_ptr() % _ALIGNMENT == 0


def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    try:
        return frozenset(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return frozenset()


def _watched(inner: Any) -> Replays | None:
    """Put a watch on the function's kernels; None where it keeps them in another way."""
    kernels = getattr(inner, "compile_cache", None)
    if not all(hasattr(kernels, method) for method in ("__contains__", "__getitem__", "__setitem__")):
        return None
    if not isinstance(kernels, WatchedKernels):
        kernels = WatchedKernels(kernels)
        inner.compile_cache = kernels
    return Replays(kernels)
