"""A GGUF file through the whole service: the tokens of transformers for the same file, and what is said of it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from cluster.client.client import AsyncBatonClient, Connection
from cluster.config.load import load_config
from cluster.launch import launch
from cluster.server.grpc.serve import start_server
from gguf_files import MIXED, write_gguf
from workers.errors import CheckpointError
from workers.sampling_params import SamplingParams

TinyCheckpoint = Callable[..., Path]
NUM_TOKENS = 24


def overrides(file: Path) -> dict[str, object]:
    return {
        "model.path": str(file),
        "model.max_model_len": 256,
        "server.port": 0,
        "handoff.connector": "local",
        "prefill.num_blocks": 64,
        "decode.num_blocks": 64,
        "prefill.max_num_batched_tokens": 32,
    }


def greedy(file: Path, prompt: list[int]) -> list[int]:
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NUM_TOKENS,
            min_new_tokens=NUM_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


async def test_tokens_equal_those_of_transformers(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    file = write_gguf(tiny_checkpoint("llama"), tmp_path / "tiny.Q4.gguf", MIXED)
    config = load_config(environ={}, overrides={**overrides(file), "model.dtype": "float32"})
    said: list[str] = []
    rng = random.Random(0)
    prompt = [rng.randrange(3, 500) for _ in range(70)]
    async with launch(config, said.append) as service:
        server = await start_server(config.server, service.generation, service.engine, service.model_info)
        async with AsyncBatonClient(Connection(server.address)) as client:
            sampling = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
            tokens: list[int] = []
            async for chunk in client.generate(token_ids=prompt, sampling=sampling):
                tokens += chunk.token_ids
            usages = [chunk.usage async for chunk in client.generate(chat=[("user", "the cat")], sampling=sampling)]
            info = await client.model_info()
        await server.stop()
    assert tokens == greedy(file, prompt)
    assert (info.name, info.has_chat_template, info.eos_token_ids) == ("tiny.Q4", True, (2,))
    assert usages[-1] is not None
    assert usages[-1].prompt_tokens > 10
    (loading,) = (line for line in said if line.startswith("loading tiny.Q4.gguf"))
    assert "0.6 MB each in float32, out of 0." in loading
    assert all(kind.name in loading for kind in MIXED.values())
    assert loading.endswith(" in the file")


async def test_a_file_that_cannot_be_served_is_refused_before_anything_starts(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(tiny_checkpoint("llama"), tmp_path / "tiny.gguf", MIXED)
    file.write_bytes(file.read_bytes()[:-100])
    monkeypatch.setattr("ray.init", lambda **_: pytest.fail("Ray was started"))
    config = load_config(environ={}, overrides={**overrides(file), "handoff.connector": "nixl"})
    with pytest.raises(CheckpointError, match="is truncated"):
        async with launch(config, lambda line: None):
            pass
