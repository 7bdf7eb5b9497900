"""FLEX_ATTENTION on a CPU leaves PyTorch's own settings alone: other threads have them too."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import flex_attention as flex

from attention.backends.flex_attention.backend import FlexAttentionBackend, FlexAttentionMetadata
from attention.spec import AttentionSpec
from paged_case import MIXED, paged_case

PLAIN = AttentionSpec(4, 2, 16, 0.25)
SPECS = (PLAIN, replace(PLAIN, has_sinks=True), replace(PLAIN, logits_soft_cap=3.0, sliding_window=9))


def _settings() -> dict[str, Any]:
    """What the module, the tracer and the compiler are told to do."""
    return {
        "module": {name: value for name, value in vars(flex).items() if isinstance(value, bool | int | float)},
        "tracing": torch.fx._symbolic_trace._is_fx_tracing_flag,
        "dynamo": torch._dynamo.config.get_config_copy(),
    }


def test_no_setting_is_another_one_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    case = paged_case(PLAIN)
    builder = FlexAttentionBackend.builder_class(PLAIN, torch.float32, 16, torch.device("cpu"))
    plan = builder.build(case.common)
    assert isinstance(plan, FlexAttentionMetadata)
    before, seen = _settings(), []

    def watched(real: Any) -> Any:
        def mask_mod(*args: torch.Tensor) -> torch.Tensor:
            seen.append(_settings())
            return real(*args)

        return mask_mod

    for group in plan.groups:
        monkeypatch.setattr(group.block_mask, "mask_mod", watched(group.block_mask.mask_mod))
    FlexAttentionBackend.impl_class(PLAIN).forward(case.query, case.key, case.value, case.cache, plan)
    assert seen
    assert all(settings == before for settings in seen)


def test_threads_of_different_layers_do_not_disturb_each_other() -> None:
    cases = [paged_case(spec, MIXED, seed=seed) for seed in range(2) for spec in SPECS]
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda case: case.run(FlexAttentionBackend), cases))
    for case, answer in zip(cases, answers, strict=True):
        torch.testing.assert_close(answer.double(), case.expected, rtol=2e-5, atol=2e-5)
