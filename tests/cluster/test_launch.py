"""What stops a launch before anything has started, or in the middle of it."""

from __future__ import annotations

import socket

import pytest

from cluster.api import EngineRequest
from cluster.config import load_config
from cluster.launch import launch
from workers.errors import CheckpointError, ConfigError
from workers.sampling.params import SamplingParams


async def start(**overrides) -> None:
    settings = {key.replace("__", "."): value for key, value in overrides.items()}
    async with launch(load_config(environ={}, overrides=settings), lambda line: None):
        pytest.fail("it started")


async def test_a_ray_address_where_nobody_listens(tiny_checkpoint):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"cannot reach Ray at {address}: .*refused"):
            await start(model__path=str(tiny_checkpoint("llama")), ray__address=address)


async def test_a_missing_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="nothing-here"):
        await start(model__path=str(tmp_path / "nothing-here"))


async def test_unlike_block_sizes_are_refused_with_both(tiny_checkpoint):
    with pytest.raises(ConfigError, match=r"block_size is (16 here and 32|32 here and 16) there"):
        await start(
            model__path=str(tiny_checkpoint("llama")),
            handoff__connector="local",
            decode__block_size=32,
            prefill__num_blocks=256,
            decode__num_blocks=256,
        )


async def test_a_cache_too_small_for_one_sequence_says_what_to_change(tiny_checkpoint):
    with pytest.raises(ConfigError, match=r"8 blocks of 16 tokens cannot hold .* max_model_len 2048 \(128 blocks\)"):
        await start(model__path=str(tiny_checkpoint("llama")), handoff__connector="local", decode__num_blocks=8)


async def test_an_attention_backend_that_does_not_exist(tiny_checkpoint):
    with pytest.raises(ConfigError, match="CPU_ATTN"):
        await start(
            model__path=str(tiny_checkpoint("llama")), handoff__connector="local", prefill__attention_backend="CPU_ATN"
        )


async def test_a_whole_service_in_one_process(tiny_checkpoint, reference_greedy):
    checkpoint = tiny_checkpoint("qwen3")
    overrides = {"model.path": str(checkpoint), "handoff.connector": "local", "model.max_model_len": 256}
    lines: list[str] = []
    async with launch(load_config(environ={}, overrides=overrides), lines.append) as service:
        assert service.model_info.max_model_len == 256
        assert service.model_info.architecture == "qwen3"
        prompt = tuple(range(3, 90))
        sampling = SamplingParams(temperature=0.0, seed=0, max_tokens=9, ignore_eos=True)
        stream = service.engine.generate(EngineRequest("r", prompt, sampling, 30.0))
        tokens = [token.token_id async for chunk in stream for token in chunk.tokens]
    assert tokens == reference_greedy(checkpoint, list(prompt), 9)
    assert any("into 1 prefill workers on cpu and 1 decode workers on cpu, 0." in line for line in lines)
    # Full batches of 256 tokens; a token has keys and values of 2 heads of 32 floats in each of 3 layers.
    assert any("256 KV blocks of 16 tokens (4096 tokens, 6.3 MB)" in line for line in lines)
