"""Preemption: sequences go to host memory and come back, with every byte, and no token is lost or computed again."""

from __future__ import annotations

import pytest
import torch

from local_cluster import LocalCluster
from logits_tap import LogitsTap
from one_gpu import OneGpu
from request_load import mixed_requests, run_under_load
from shapes import MEDIUM
from workers.models.loader import load_model
from workers.runner.model_runner import ModelRunner


def raw(cache: torch.Tensor) -> torch.Tensor:
    """A cache as bytes, so that NaN equals NaN."""
    return cache.view(torch.uint8)


@pytest.mark.parametrize(("dtype", "kv_cache_dtype"), [("float32", "auto"), ("bfloat16", "auto"), ("bfloat16", "fp8")])
def test_blocks_come_back_byte_for_byte(dtype, kv_cache_dtype, device, tiny_checkpoint):
    model = load_model(tiny_checkpoint("llama"), dtype, device, kv_cache_dtype=kv_cache_dtype)
    runner = OneGpu(model, num_blocks=24, max_num_seqs=4, max_model_len=128, enforce_eager=True).runner
    bits = torch.randint(0, 256, raw(runner.kv_caches[0]).shape, dtype=torch.uint8)
    raw(runner.kv_caches[0]).copy_(bits)
    away, home = [3, 17, 4, 22, 9], [11, 0, 23, 5, 12]
    data = runner.read_blocks(away)
    raw(runner.kv_caches[0])[:, away] = 0x55  # somebody else has them now
    runner.write_blocks(home, data)
    after = raw(runner.kv_caches[0]).cpu()
    assert torch.equal(after[:, home], bits[:, away])
    untouched = [block for block in range(24) if block not in (*away, *home)]
    assert torch.equal(after[:, untouched], bits[:, untouched])


class RoundTrips:
    """Watches every sequence's way to host memory and back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.changed = 0
        read, write = ModelRunner.read_blocks, ModelRunner.write_blocks

        def keep_read(runner, blocks, group=0):
            data = read(runner, blocks, group)
            self.changed += not torch.equal(data.view(torch.uint8), raw(runner.kv_caches[group])[:, list(blocks)].cpu())
            return data

        def keep_write(runner, blocks, data, group=0):
            write(runner, blocks, data, group)
            self.count += 1
            self.changed += not torch.equal(data.view(torch.uint8), raw(runner.kv_caches[group])[:, list(blocks)].cpu())

        monkeypatch.setattr(ModelRunner, "read_blocks", keep_read)
        monkeypatch.setattr(ModelRunner, "write_blocks", keep_write)


@pytest.mark.parametrize("steps_ahead", [0, 1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_pool_too_small_for_its_load(dtype, steps_ahead, device, tiny_checkpoint, monkeypatch):
    """In float32 the tokens are those of a run with enough memory. Nobody computes a token twice."""
    checkpoint = tiny_checkpoint("llama", **(MEDIUM if device == "cuda" else {}))
    count, prompt, output, pool = (64, 200, 80, 90) if device == "cuda" else (14, 40, 24, 7)
    vocab = MEDIUM["vocab_size"] if device == "cuda" else 512
    requests = mixed_requests(count, vocab_size=vocab, longest_prompt=prompt, longest_output=output, seed=4)
    shape = {"device": device, "dtype": dtype, "steps_ahead": steps_ahead, "prefill_blocks": 512, "max_num_seqs": 32}
    roomy = run_under_load(LocalCluster(checkpoint, **shape, decode_blocks=1024), requests)
    trips, tap = RoundTrips(monkeypatch), LogitsTap(monkeypatch)
    cluster = LocalCluster(checkpoint, **shape, decode_blocks=pool)
    tokens = run_under_load(cluster, requests)
    cluster.assert_all_blocks_free()
    assert trips.count > 2
    assert trips.changed == 0
    assert {name: len(answer) for name, answer in tokens.items()} == {r.name: r.sampling.max_tokens for r in requests}
    assert len(tap.prefill) == count, "a prompt was computed again"
    assert sum(tap.batch_sizes) == sum(len(answer) - 1 for answer in tokens.values()), "a token was computed again"
    if dtype == "float32":
        assert tokens == roomy


def test_who_was_away_has_the_bits_of_who_was_not(device, tiny_checkpoint):
    """In batches of the same size the round trip itself changes nothing, in bf16 either."""
    model = load_model(tiny_checkpoint("llama"), "bfloat16", device)
    answers = []
    for leaves in (False, True):
        one = OneGpu(model, num_blocks=32, max_num_seqs=4, max_model_len=256)
        steps = one.greedy(list(range(5, 75)), 12)
        logits = [next(steps) for _ in range(6)]
        if leaves:  # to host memory, other blocks, and home again, all while nobody looks
            data = one.runner.read_blocks(list(range(6)))
            raw(one.runner.kv_caches[0])[:, :6] = 0x55
            one.runner.write_blocks([20, 25, 21, 30, 22, 29], data)
            again = one.runner.read_blocks([20, 25, 21, 30, 22, 29])
            one.runner.write_blocks(list(range(6)), again)
        answers.append([*logits, *steps])
    for there, here in zip(*answers, strict=True):
        assert torch.equal(there, here)
