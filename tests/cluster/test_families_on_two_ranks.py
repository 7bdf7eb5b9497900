"""Families whose ranks share in ways of their own, each in a service of its own on real parts."""

from __future__ import annotations

import asyncio

import pytest

from rank_service import prompts, serving

pytestmark = [pytest.mark.ray, pytest.mark.nixl, pytest.mark.timeout(360)]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["deepseek_v2", "gemma2", "gpt_oss", "qwen3_moe"])
async def test_other_families_on_two_ranks(family: str, tiny_checkpoint, reference_greedy, tmp_path) -> None:
    """Latents, which every rank has whole and which cross once; windows in a group of their own; sinks; experts."""
    checkpoint = tiny_checkpoint(family)
    async with serving(checkpoint, tmp_path, 256) as service:
        asked = prompts(6, seed=5)
        answers = await asyncio.gather(*(service.generate(prompt, 12) for prompt in asked))
        for prompt, answer in zip(asked, answers, strict=True):
            assert answer == reference_greedy(checkpoint, prompt, 12), len(prompt)
        if family == "deepseek_v2":
            layers, latent, block_size = 3, 24 + 8, 16
            assert await service.kv_bytes([9] * 65) == 5 * block_size * layers * latent * 4
        await service.until_idle()
