"""What code forces holds for the whole process: on every thread, and blocks of several threads may overlap."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack

import pytest
import torch

from attention.backends.flash_attn.versions import choose_provider, force_flash_attn_version
from attention.platform import DeviceKind, Platform
from attention.selection.selector import force_attn_backend, select_backend
from attention.spec import AttentionNeeds, AttentionSpec, Phase

SPEC = AttentionSpec(8, 2, 64, 0.125)


def backend(phase: Phase | None = None) -> str:
    """The chosen backend on a CPU."""
    needs = AttentionNeeds(SPEC, torch.float32, 16, phase)
    return select_backend(Platform(DeviceKind.CPU, "CPU"), needs).backend.name


def version() -> str:
    """The chosen FlashAttention on an H100."""
    return f"{choose_provider(Platform.simulate('sm90'), SPEC).version.value}"


Force = Callable[[str], AbstractContextManager[None]]
KINDS: dict[str, tuple[Force, Callable[[], str], tuple[str, str]]] = {
    "backend": (force_attn_backend, backend, ("CPU_ATTN", "TORCH_SDPA")),
    "FlashAttention": (lambda name: force_flash_attn_version(int(name)), version, ("4", "2")),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_threads_see_it(kind: str) -> None:
    force, chosen, (default, other) = KINDS[kind]
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(chosen).result() == default
        with force(other):
            assert thread.submit(chosen).result() == chosen() == other
        assert thread.submit(chosen).result() == chosen() == default


def test_blocks_of_two_threads_that_overlap_each_take_back_their_own() -> None:
    with ThreadPoolExecutor(1) as thread, ExitStack() as mine, ExitStack() as theirs:
        mine.enter_context(force_attn_backend("TORCH_SDPA"))
        thread.submit(theirs.enter_context, force_attn_backend("FLEX_ATTENTION")).result()
        assert backend() == "FLEX_ATTENTION"
        mine.close()
        assert backend() == "FLEX_ATTENTION", "the first that ends takes nothing of the other back"
        thread.submit(theirs.close).result()
        assert backend() == "CPU_ATTN"


def test_the_last_block_that_says_something_of_a_phase_wins() -> None:
    with force_attn_backend("TORCH_SDPA", Phase.DECODE):
        with force_attn_backend("FLEX_ATTENTION"):
            assert [backend(phase) for phase in Phase] == ["FLEX_ATTENTION"] * 2
            with force_attn_backend("CPU_ATTN", Phase.DECODE):
                assert [backend(phase) for phase in Phase] == ["FLEX_ATTENTION", "CPU_ATTN"]
                assert backend() == "FLEX_ATTENTION"
        assert [backend(phase) for phase in Phase] == ["CPU_ATTN", "TORCH_SDPA"]


def test_an_error_in_the_block_ends_it() -> None:
    with pytest.raises(RuntimeError, match="in the block"), force_attn_backend("TORCH_SDPA"):
        raise RuntimeError("in the block")
    assert backend() == "CPU_ATTN"
