"""Every backend × feature × dtype × shape against attention written out in float64.

A backend that refuses a case must do so for a reason that its own table gives, or one of its own beside the table.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import fields, replace
from itertools import combinations, product

import pytest
import torch
from _pytest.mark import ParameterSet

from attention.backend import AttentionBackend, AttentionImpl, AttentionMetadata
from attention.errors import AttentionInputError
from attention.metadata import build_metadata
from attention.platform import Platform
from attention.selection.registry import BACKENDS, get_backend
from attention.spec import AttentionNeeds, Feature
from attention_batches import Batches
from attention_cases import Case
from attention_checks import check_cache, check_output, check_refusal
from attention_inputs import LAYER, Inputs, draw
from attention_limits import LIMITS, cases_for
from attention_matrix import AXES
from conformance_summary import note
from long_tails import one_of_each

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PLATFORM = Platform.of(DEVICE)
MLA = tuple(name for name, where in BACKENDS.items() if ".mla." in where)
"""Backends of another kind of layer, tested on their own."""
NAMES = tuple(name for name in BACKENDS if name not in MLA)
CASES = {
    name: [(case, get_backend(name).refuse(PLATFORM, case.needs)) for case in cases_for(name, DEVICE.type)]
    for name in NAMES
}
"""Every backend's cases, and why it refuses them here."""


def shown(param: ParameterSet) -> Iterator[Hashable]:
    """Of a case: every value of every axis, all of its features together, and each with the dtype, lengths and another.

    On a GPU itself.
    """
    name, case = param.values
    assert isinstance(case, Case)
    if DEVICE.type != "cpu":
        yield param.id
        return
    yield from ((name, field.name, getattr(case, field.name)) for field in fields(case))
    features = sorted(case.needs.all_features, key=str)
    beside = (case.dtype, case.attn_type, case.batch.phase, case.new_keys, len(set(case.query_lens)) > 1)
    yield (name, case.attn_type, *features)
    yield from ((name, *pair) for pair in product(features, beside))
    yield from ((name, *pair) for pair in combinations(features, 2))


RUN = one_of_each(
    (
        pytest.param(name, case, id=f"{name}-{case.id}")
        for name in NAMES
        for case, refused in CASES[name]
        if not refused
    ),
    kinds=shown,
)
"""On a CPU the normal run takes as many as show everything."""


def usable_case(name: str) -> Case | None:
    """A plain case that the backend runs here; None where it runs nothing."""
    for dtype in (torch.float32, torch.bfloat16):
        case = Case(Batches().core[0], dtype, num_heads=4, num_kv_heads=2, head_size=64)
        if not get_backend(name).refuse(PLATFORM, AttentionNeeds(case.spec, dtype, case.block_size)):
            return case
    return None


PLAIN = {name: case for name in NAMES if (case := usable_case(name)) is not None}
"""A plain case of every backend that runs here."""
WITHOUT_MASK = [
    (name, feature)
    for name in PLAIN
    for feature in (Feature.TREE_MASK, Feature.CUSTOM_MASK)
    if feature not in get_backend(name).capabilities.features
]


@pytest.mark.parametrize(("name", "case"), RUN)
def test_float64_reference(name: str, case: Case, request: pytest.FixtureRequest) -> None:
    note(request, name)
    backend = get_backend(name)
    check_refusal(backend, PLATFORM, case.needs, [])
    inputs = draw(case, DEVICE)
    check_attention(name, case, inputs, *prepare(backend, case, inputs))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_refused_is_refused_for_the_tables_reasons(name: str, request: pytest.FixtureRequest) -> None:
    refused = [(case, reasons) for case, reasons in CASES[name] if reasons]
    for case, reasons in refused:
        check_refusal(get_backend(name), PLATFORM, case.needs, reasons)
    note(request, name, [reasons for _, reasons in refused])


@pytest.mark.parametrize("name", PLAIN)
def test_a_builder_plans_batch_after_batch(name: str) -> None:
    """Workspaces that a builder keeps must not carry anything from one batch into the next."""
    backend = get_backend(name)
    base = PLAIN[name]
    drawn = [(case, draw(case, DEVICE)) for case in (replace(base, batch=batch) for batch in small_batches(name).core)]
    builder = backend.builder_class(base.spec, base.dtype, base.block_size, DEVICE)
    for case, inputs in [*drawn, drawn[0], drawn[1]]:
        if backend.refuse(PLATFORM, case.needs):
            continue
        metadata = builder.build(inputs.common)
        fresh = replace(inputs, cache=inputs.cache.clone() if inputs.cache is not None else None)
        check_attention(name, case, fresh, backend.impl_class(case.spec), metadata)


@pytest.mark.parametrize("name", PLAIN)
def test_an_empty_batch_gives_an_empty_output(name: str) -> None:
    backend = get_backend(name)
    case = PLAIN[name]
    cache = draw(case, DEVICE).cache
    assert cache is not None
    before = cache.clone()
    empty = build_metadata([], [], [], case.block_size, DEVICE)
    query = torch.empty(0, case.num_heads, case.head_size, dtype=case.dtype, device=DEVICE)
    key = torch.empty(0, case.num_kv_heads, case.head_size, dtype=case.dtype, device=DEVICE)
    metadata = backend.builder_class(case.spec, case.dtype, case.block_size, DEVICE).build(empty)
    output = backend.impl_class(case.spec).forward(query, key, key.clone(), cache[LAYER], metadata)
    assert output.shape == query.shape
    assert torch.equal(cache.view(torch.uint8), before.view(torch.uint8))


@pytest.mark.parametrize(("name", "feature"), WITHOUT_MASK)
def test_a_batch_with_a_mask_that_is_not_in_the_table_is_refused(name: str, feature: Feature) -> None:
    backend = get_backend(name)
    if feature is Feature.TREE_MASK:
        case = replace(PLAIN[name], batch=Batches().trees[0], mask="tree")
    else:
        case = replace(PLAIN[name], batch=Batches().custom[1], mask="custom")
    builder = backend.builder_class(case.spec, case.dtype, case.block_size, DEVICE)
    with pytest.raises(AttentionInputError, match="mask"):
        builder.build(draw(case, DEVICE).common)


@pytest.mark.parametrize("name", BACKENDS)
def test_only_backends_made_for_mla_are_left_to_other_tests(name: str) -> None:
    backend = get_backend(name)
    assert backend.name == name
    assert backend.capabilities.mla == (name in MLA)


def interpreted(name: str) -> bool:
    """Whether an interpreter runs the backend's kernels here."""
    limit = LIMITS.get((name, DEVICE.type))
    return limit is not None and limit.axes == "interpreted"


def small_batches(name: str) -> Batches:
    """Batches that do not take the backend long here."""
    limit = LIMITS.get((name, DEVICE.type))
    return AXES[limit.axes if limit is not None else DEVICE.type].batches


def prepare(backend: type[AttentionBackend], case: Case, inputs: Inputs) -> tuple[AttentionImpl, AttentionMetadata]:
    """A layer and a planned batch, as a model makes them."""
    builder = backend.builder_class(case.spec, case.dtype, case.block_size, DEVICE)
    return backend.impl_class(case.spec, inputs.sinks), builder.build(inputs.common)


def check_attention(name: str, case: Case, inputs: Inputs, impl: AttentionImpl, metadata: AttentionMetadata) -> None:
    """Run a layer twice, into a poisoned buffer and into a new one, and check all that it wrote.

    Interpreted kernels, which are slow, run plain cases twice, of each kind of batch: who makes the buffer hangs
    on no feature.
    """
    impl.kv_scales = inputs.scales
    cache_after = inputs.cache_after()
    layer = inputs.cache[LAYER] if inputs.cache is not None else None
    given = [tensor.clone() if tensor is not None else None for tensor in (inputs.query, inputs.key, inputs.value)]
    buffer = torch.full(inputs.expected.shape, float("nan"), dtype=case.dtype, device=DEVICE)
    written = impl.forward(inputs.query, inputs.key, inputs.value, layer, metadata, buffer)
    twice = not interpreted(name) or not case.needs.all_features - {Feature.GQA, Feature.PREFIX}
    again = impl.forward(inputs.query, inputs.key, inputs.value, layer, metadata) if twice else buffer
    assert written is buffer or (written.data_ptr() == buffer.data_ptr() and written.shape == buffer.shape)
    check_output(buffer, torch.zeros_like(inputs.expected) if name == "NO_ATTENTION" else inputs.expected)
    assert again.dtype == case.dtype
    assert torch.equal(again, buffer), f"the second run differs by {(again - buffer).abs().max().item():.2e}"
    for before, after in zip(given, (inputs.query, inputs.key, inputs.value), strict=True):
        assert before is None or (after is not None and torch.equal(before, after)), "an input was changed"
    if inputs.cache is not None and cache_after is not None:
        check_cache(inputs, cache_after)
