"""Families with experts or latents against transformers, whatever their configuration says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from fuzzing import fuzzed
from made_configs import CONFIGS
from workers.errors import BatonError
from workers.models.loader import load_model

pytestmark = pytest.mark.fuzz
PROMPT = [3 + (7 * i * i + 31 * i) % 497 for i in range(75)]


@pytest.mark.parametrize("family", CONFIGS)
def test_logits_equal_transformers_or_the_configuration_is_refused(
    family: str, tiny_checkpoint: Callable[..., Path], reference: Any, paged_run: Any
) -> None:
    refused: list[BatonError] = []
    compared = 0

    @fuzzed(4)
    @given(config=CONFIGS[family], seed=st.integers(0, 3))
    def check(config: dict[str, Any], seed: int) -> None:
        nonlocal compared
        try:
            checkpoint = tiny_checkpoint(family, seed=seed, **config)
            expected = reference(checkpoint).logits(PROMPT)
        except (ValueError, RuntimeError):  # transformers cannot make of it, or cannot run what it has made
            assume(False)
        try:
            decoder = load_model(checkpoint, dtype="float32", block_size=16)
        except BatonError as error:
            refused.append(error)
            return
        run = paged_run(decoder, num_sequences=2, max_tokens=80)
        (whole,) = run.step({0: PROMPT})
        chunked = torch.cat([run.step({1: PROMPT[a:b]})[0] for a, b in ((0, 20), (20, 21), (21, 75))])
        spread = expected.std()
        for ours in (whole, chunked):
            torch.testing.assert_close(ours / spread, expected / spread, rtol=1e-3, atol=2e-3)
        compared += 1

    check()
    assert compared > 0, refused
