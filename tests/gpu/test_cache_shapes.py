"""What the cache looks like changes no token: block sizes, head sizes, groups of heads, windows; FP8 hardly."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from attention.spec import FP8
from cache_groups import group_caches
from local_cluster import LocalCluster
from near_ties import NEAR_TIE, Float32Reference, logit_error
from request_load import mixed_requests, run_under_load
from shapes import MEDIUM
from workers.models.loader import load_model
from workers.runner.model_runner import ModelRunner, Row

FP8_NEAR_TIE = 0.8
"""As `NEAR_TIE`: keys and values of 4 significant bits move logits by 0.075 standard deviations, and the largest of a
thousand gaps is 0.62, the same on a CPU and on a GPU."""
SHAPES = {
    "llama-64": ("llama", {"head_dim": 64}),
    "llama-128": ("llama", {"head_dim": 128}),
    "llama-mha": ("llama", {"head_dim": 64, "num_key_value_heads": 4}),
    "llama-one-kv-head": ("llama", {"head_dim": 64, "num_key_value_heads": 1}),
    "mistral-window": ("mistral", {"head_dim": 64, "sliding_window": 40}),
    "qwen3": ("qwen3", {"head_dim": 128}),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_block_sizes_give_the_same_tokens(shape, device, tiny_checkpoint):
    """In float32, with prompts split into chunks, against transformers."""
    family, overrides = SHAPES[shape]
    checkpoint = tiny_checkpoint(family, **overrides)
    count, prompt, output = (40, 300, 32) if device == "cuda" else (3, 90, 5)
    requests = mixed_requests(count, vocab_size=512, longest_prompt=prompt, longest_output=output, sampled=True)
    answers = {}
    for block_size in (16, 32, 64, 128):
        num_blocks = 4096 // block_size
        cluster = LocalCluster(
            checkpoint,
            device=device,
            block_size=block_size,
            prefill_blocks=num_blocks,
            decode_blocks=num_blocks,
            max_num_batched_tokens=100,
        )
        answers[block_size] = run_under_load(cluster, requests)
        cluster.assert_all_blocks_free()
    assert answers[16] == answers[32] == answers[64] == answers[128]
    reference = Float32Reference(checkpoint, torch.float32, device)
    for request in requests:
        gaps = reference.gaps(request.prompt, answers[16][request.name], request.sampling)
        assert float(gaps.max()) <= NEAR_TIE[torch.float32]


@pytest.fixture(scope="module")
def scaled_checkpoint(tiny_checkpoint, tmp_path_factory) -> Path:
    """A checkpoint with scales of its own for an FP8 cache."""
    folder = Path(shutil.copytree(tiny_checkpoint("llama", head_dim=64), tmp_path_factory.mktemp("scaled") / "model"))
    file = folder / "model.safetensors"
    scales = {
        f"model.layers.{layer}.self_attn.{kind}_scale": torch.tensor(scale)
        for layer in range(3)
        for kind, scale in (("k", 0.05), ("v", 0.02))
    }
    save_file({**load_file(file), **scales}, file, metadata={"format": "pt"})
    return folder


def logits_of(checkpoint: Path, tokens: list[int], dtype: str, device: str, kv_cache_dtype: str) -> torch.Tensor:
    """(n, vocab): the first half of the tokens as a prompt, the others one by one over the cache, one worker."""
    model = load_model(checkpoint, dtype, device, kv_cache_dtype=kv_cache_dtype)
    runner = ModelRunner(model, group_caches(model, 32))
    half, blocks = len(tokens) // 2, [range(32)]
    logits = [runner.forward([Row(tokens[:half], 0, blocks)])]
    logits += [runner.forward([Row(tokens[i : i + 1], i, blocks)]) for i in range(half, len(tokens))]
    return torch.cat(logits).cpu()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_fp8_cache_moves_logits_as_little_here_as_on_a_cpu(dtype, device, scaled_checkpoint):
    """Against the same cache in float32 on a CPU: what remains is the rounding of the activations."""
    (request,) = mixed_requests(1, vocab_size=512, longest_prompt=200, longest_output=1, seed=11)
    tokens = list(request.prompt) + list(range(20, 60))
    full = logits_of(scaled_checkpoint, tokens, "float32", "cpu", "auto")
    expected = logits_of(scaled_checkpoint, tokens, "float32", "cpu", "fp8")
    found = logits_of(scaled_checkpoint, tokens, dtype, device, "fp8")
    quantized, rounded = logit_error(expected, full), logit_error(found, expected)
    print(f"FP8 moves logits by {quantized:.4f} standard deviations; {device} {dtype} differs by {rounded:.4f} of one")
    assert 0 < quantized < 0.15
    assert rounded < (0.02 if dtype == "float32" else 0.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_pair_with_an_fp8_cache(dtype, device, scaled_checkpoint):
    """Through handoff and preemption; every token is the best for a full cache, or as near as FP8 comes."""
    count, prompt, output, pool = (60, 200, 32, 60) if device == "cuda" else (10, 60, 20, 10)
    requests = mixed_requests(count, vocab_size=512, longest_prompt=prompt, longest_output=output)
    cluster = LocalCluster(
        scaled_checkpoint,
        device=device,
        dtype=dtype,
        kv_cache_dtype="fp8",
        prefill_blocks=256,
        decode_blocks=pool,
        max_num_batched_tokens=64,
    )
    assert cluster.model.kv_cache_groups[0].dtype == FP8
    answers = run_under_load(cluster, requests)
    cluster.assert_all_blocks_free()
    reference = Float32Reference(scaled_checkpoint, getattr(torch, dtype), device)
    gaps = torch.cat([reference.gaps(r.prompt, answers[r.name], r.sampling) for r in requests])
    print(
        f"{device} {dtype} fp8: {int((gaps > 0).sum())} of {len(gaps)} tokens are not the best, "
        f"at most {gaps.max():.3f} below it"
    )
    assert float((gaps > 0).float().mean()) < 0.2
    assert float(gaps.max()) < FP8_NEAR_TIE


def test_a_medium_model_with_a_window_and_large_blocks(device, tiny_checkpoint):
    """bf16, blocks of 128, a window that ends within a block."""
    if device == "cpu":
        checkpoint = tiny_checkpoint("mistral", sliding_window=40)
    else:
        checkpoint = tiny_checkpoint("mistral", **{**MEDIUM, "head_dim": 128}, sliding_window=200)
    count, prompt, output = (60, 450, 40) if device == "cuda" else (4, 80, 8)
    vocab = MEDIUM["vocab_size"] if device == "cuda" else 512
    requests = mixed_requests(count, vocab_size=vocab, longest_prompt=prompt, longest_output=output)
    cluster = LocalCluster(
        checkpoint, device=device, dtype="bfloat16", block_size=128, max_num_seqs=32, max_num_batched_tokens=150
    )
    answers = run_under_load(cluster, requests)
    reference = Float32Reference(checkpoint, torch.bfloat16, device)
    for request in requests:
        gaps = reference.gaps(request.prompt, answers[request.name], request.sampling)
        assert float(gaps.max()) <= NEAR_TIE[torch.bfloat16]
