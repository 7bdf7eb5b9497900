"""Models of GGUF files against the same files read by transformers: the same config, the same weights to the bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Type
from safetensors.torch import save_file

from gguf_files import K_BLOCKS, MIXED, tokenizer_keys, write_gguf
from paged_run import PagedRun
from ranks import lone_rank
from workers.models.loader import load_model
from workers.models.registry import read_model

TinyCheckpoint = Callable[..., Path]


@dataclass(frozen=True)
class Case:
    """A file.

    Attributes:
        family: of the tiny checkpoint.
        settings: of its config.
        types: how its tensors are stored.
        unread: what transformers does not read from the file and takes a default for.
    """

    family: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    types: Mapping[str, Type] = field(default_factory=lambda: MIXED)
    unread: Mapping[str, Any] = field(default_factory=dict)


_GEMMA = {"query_pre_attn_scalar": 16}
CASES = {
    "llama": Case("llama"),
    "llama-plain": Case("llama", {"tie_word_embeddings": True}, {}),
    "llama-k": Case("llama", {"intermediate_size": 256, "num_key_value_heads": 1}, K_BLOCKS),
    "llama-q4-k": Case("llama", {"intermediate_size": 512}, {"ffn_down": Type.Q4_K}),
    "qwen2": Case("qwen2", {"tie_word_embeddings": True}),
    "qwen3": Case("qwen3", unread={"head_dim": 32}),
    "gemma2": Case("gemma2", _GEMMA, unread={**_GEMMA, "attn_logit_softcapping": 5.0}),
    "gemma3": Case(
        "gemma3",
        _GEMMA,
        unread={**_GEMMA, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
}


@pytest.fixture(scope="module", params=CASES)
def read_twice(
    request: pytest.FixtureRequest, tiny_checkpoint: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A GGUF file, and a folder with what transformers made of it."""
    case, folder = CASES[request.param], tmp_path_factory.mktemp("gguf")
    file = write_gguf(tiny_checkpoint(case.family, **case.settings), folder / "model.gguf", case.types)
    config = transformers.AutoConfig.from_pretrained(folder, gguf_file=file.name)
    for key, value in case.unread.items():
        setattr(config, key, value)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file.name, config=config, dtype=torch.float32
    )
    config = transformers.AutoConfig.for_model(**{**config.to_dict(), "quantization_config": None})
    config.save_pretrained(folder / "read")
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    save_file(tensors, folder / "read" / "model.safetensors")
    return file, folder / "read"


def test_the_config_is_that_of_transformers(read_twice: tuple[Path, Path]) -> None:
    file, folder = read_twice
    (ours, model), (theirs, expected) = read_model(file), read_model(folder)
    assert ours is theirs
    assert replace(model, dtype="") == replace(expected, dtype="", eos_token_ids=(2,))


@pytest.mark.parametrize("size", [1, 2])
def test_the_weights_of_every_rank_are_those_of_transformers(
    read_twice: tuple[Path, Path], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)  # weights stay as they are loaded
    file, folder = read_twice
    for rank in range(size):
        ours, expected = (
            dict(load_model(path, dtype="float32", group=lone_rank(rank, size)).named_parameters())
            for path in (file, folder)
        )
        assert ours.keys() == expected.keys()
        assert ours["layers.1.self_attention.qkv_proj.weight"].numel() > 0
        for name, parameter in ours.items():
            assert torch.equal(parameter, expected[name]), (rank, name)


def test_files_with_other_tokens_keep_other_caches(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("llama")
    keys = tokenizer_keys(checkpoint, 512)
    others = {"tokenizer.ggml.tokens": [*keys["tokenizer.ggml.tokens"][:-1], "other"]}
    a, b, c = (
        load_model(write_gguf(checkpoint, tmp_path / name, metadata=metadata)).identity
        for name, metadata in (("a", {}), ("b", others), ("c", {"tokenizer.chat_template": "{{ 1 }}"}))
    )
    assert a == c
    assert a != b


def test_frequencies_that_llama_3_stretches_are_read(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    """`transformers` ignores `rope_freqs`, so the checkpoint that the file was made of is the truth."""
    checkpoint = tiny_checkpoint("llama3")
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    plain = 1.0 / 10000.0 ** (torch.arange(0, 16, 2) / 16)
    factors = (plain / model.model.rotary_emb.inv_freq).numpy().astype(np.float32)
    assert factors.max() > 7
    file = write_gguf(checkpoint, tmp_path / "model.gguf", tensors={"rope_freqs.weight": factors})
    ids = torch.arange(3, 203)
    with torch.inference_mode():
        expected = model(ids[None]).logits[0]
    run = PagedRun(load_model(file, dtype="float32", block_size=16), num_sequences=1, max_tokens=208)
    (ours,) = run.step({0: ids.tolist()})
    torch.testing.assert_close(ours / expected.std(), expected / expected.std(), rtol=1e-4, atol=2e-4)
