"""Draft trees together with what depends on distances, in every backend that takes them on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attention.errors import AttentionInputError
from attention.metadata import build_encoder_metadata
from attention.ops.dispatch import uses_triton
from attention.selection.registry import get_backend
from attention.spec import AttentionType
from attention_cases import Batch, Case
from attention_inputs import LAYER, draw, poison

TREE = Batch("tree7", ((7, 7), (7, 20), (7, 23), (7, 100)), None)
BASE = Case(TREE, torch.float32, num_heads=4, num_kv_heads=2, head_size=32, mask="tree")
CASES = {
    "window": replace(BASE, window=9),
    "window_narrower_than_tree": replace(BASE, window=3),
    "alibi": replace(BASE, alibi=True),
    "everything": replace(BASE, window=3, alibi=True, sinks=True, soft_cap=3.0),
    "keys_in_the_cache": replace(BASE, new_keys="none"),
}
WAYS = ("TREE_ATTN in torch", "TREE_ATTN in Triton", "TRITON_ATTN", "FLEX_ATTENTION")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("way", WAYS)
def test_window_and_alibi_count_distances_to_the_context(way: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = "TRITON" in way.upper()
    if triton and not uses_triton(torch.empty(0)):
        pytest.skip("needs TRITON_INTERPRET=1")
    for module in ("ops.paged_attention", "ops.merge_attn_states", "backends.tree_attn.backend"):
        monkeypatch.setattr(f"attention.{module}.uses_triton", lambda _tensor: triton)
    backend = get_backend(way.split()[0])
    inputs = draw(case, "cpu")
    assert inputs.cache is not None
    metadata = backend.builder_class(inputs.spec, case.dtype, case.block_size, torch.device("cpu")).build(inputs.common)
    output = poison(torch.empty_like(inputs.query, memory_format=torch.contiguous_format))
    impl = backend.impl_class(inputs.spec, inputs.sinks)
    impl.forward(inputs.query, inputs.key, inputs.value, inputs.cache[LAYER], metadata, output)
    torch.testing.assert_close(output.double(), inputs.expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["TRITON_ATTN", "FLEX_ATTENTION"])
def test_a_tree_over_an_encoder_is_refused(name: str) -> None:
    spec = replace(BASE, attn_type=AttentionType.ENCODER_ONLY).spec
    builder = get_backend(name).builder_class(spec, torch.float32, 16, torch.device("cpu"))
    common = replace(build_encoder_metadata([3, 3]), tree_mask=torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(AttentionInputError, match="tree mask"):
        builder.build(common)
