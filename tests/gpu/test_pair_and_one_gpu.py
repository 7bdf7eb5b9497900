"""A pair of workers gives what one GPU gives: bit for bit alone, token for token (but for near ties) under load."""

from __future__ import annotations

import random

import pytest
import torch
from tokenizers import Tokenizer

from cluster.recall import SHIPPED_MODEL, make_recall_prompt
from local_cluster import LocalCluster
from logits_tap import LogitsTap
from near_ties import NEAR_TIE, Float32Reference
from one_gpu import OneGpu
from request_load import LoadRequest, differing, mixed_requests, run_one_by_one, run_under_load
from shapes import MEDIUM
from workers.sampling_params import SamplingParams

WINDOW = 512
SEQS = 64


def most_preempted(monkeypatch) -> list[int]:
    """The number of sequences in host memory, at every step of every cluster from now on."""
    seen: list[int] = []
    step = LocalCluster.step

    def watched(cluster):
        step(cluster)
        seen.append(max(worker.load.preempted for worker in cluster.decode.values()))

    monkeypatch.setattr(LocalCluster, "step", watched)
    return seen


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("budget", [WINDOW, 48])
def test_a_request_alone_has_the_logits_of_one_gpu(family, dtype, budget, device, tiny_checkpoint, monkeypatch):
    """The handoff moves bytes, and both ends run the same kernels: nothing may differ, not by one bit."""
    checkpoint = tiny_checkpoint(family, **(MEDIUM if device == "cuda" else {}))
    count, steps = (6, 24) if device == "cuda" else (2, 6)
    cluster = LocalCluster(
        checkpoint, device=device, dtype=dtype, max_num_batched_tokens=budget, max_model_len=WINDOW, prefill_blocks=40
    )
    one = OneGpu(cluster.model, num_blocks=40, max_num_seqs=16, max_model_len=WINDOW, longest_prefill=budget)
    rng = random.Random(3)
    for number in range(count):
        prompt = [rng.randrange(3, cluster.model.config.vocab_size) for _ in range(rng.randint(1, 300))]
        sampling = SamplingParams(temperature=0.0, seed=0, max_tokens=steps, ignore_eos=True)
        with monkeypatch.context() as patch:
            tap = LogitsTap(patch)
            cluster.submit(f"r{number}", prompt, sampling)
            tokens = cluster.run()[f"r{number}"]
        pair = [tap.prefill[-1], *tap.decode[f"r{number}"]]
        alone = list(one.greedy(prompt, steps, budget))
        assert tokens == [int(row.argmax()) for row in alone]
        assert len(pair) == steps
        for ours, theirs in zip(pair, alone, strict=True):
            assert torch.equal(ours, theirs)
    cluster.assert_all_blocks_free()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_load_preemption_and_chunks_change_no_token(dtype, device, tiny_checkpoint, monkeypatch, record_property):
    """Many requests, greedy ones and drawn ones, run in three ways.

    In float32 their tokens are the same. In bf16 a token may differ where two candidates are as good as equal: every
    token of every run must be the best one, or nearly, for a float32 model with the same tokens before it.
    """
    checkpoint = tiny_checkpoint("llama", **(MEDIUM if device == "cuda" else {}))
    count, prompt, output, pool = (200, 400, 48, 160) if device == "cuda" else (24, 90, 24, 11)
    vocab = MEDIUM["vocab_size"] if device == "cuda" else 512
    requests = mixed_requests(count, vocab_size=vocab, longest_prompt=prompt, longest_output=output, sampled=True)
    shape = {"device": device, "dtype": dtype, "max_model_len": WINDOW, "max_num_seqs": SEQS}
    roomy = {"prefill_blocks": 512, "decode_blocks": 2048, "max_num_batched_tokens": 4096}
    preempted = most_preempted(monkeypatch)
    runs = {"alone": run_one_by_one(LocalCluster(checkpoint, **shape, **roomy), requests)}
    runs["under load"] = run_under_load(LocalCluster(checkpoint, **shape, **{**roomy, "decode_blocks": pool}), requests)
    assert max(preempted) > 0, "the pool was not too small"
    runs["in chunks"] = run_under_load(
        LocalCluster(checkpoint, **shape, **{**roomy, "max_num_batched_tokens": 48}), requests
    )
    for name in ("under load", "in chunks"):
        unequal = differing(runs["alone"], runs[name])
        record_property(f"{name}: requests with a different token", f"{len(unequal)} of {count}")
        print(f"{device} {dtype} {name}: {len(unequal)} of {count} requests have a different token")
        assert not unequal or dtype == "bfloat16"
    check_near_ties(Float32Reference(checkpoint, getattr(torch, dtype), device), dtype, requests, runs)


def check_near_ties(
    reference: Float32Reference, dtype: str, requests: list[LoadRequest], runs: dict[str, dict[str, list[int]]]
) -> None:
    for name, answers in runs.items():
        gaps = torch.cat([reference.gaps(r.prompt, answers[r.name], r.sampling) for r in requests])
        print(f"{dtype} {name}: {int((gaps > 0).sum())} of {len(gaps)} tokens are not float32's best; "
              f"the farthest is {float(gaps.max()):.4f} standard deviations below it")  # fmt: skip
        assert float(gaps.max()) <= NEAR_TIE[getattr(torch, dtype)], name


def test_the_model_that_comes_with_baton_answers_alike(device):
    """Its answers are certain, so that they are the same tokens in bf16 however they are computed, and right."""
    tokenizer = Tokenizer.from_file(str(SHIPPED_MODEL / "tokenizer.json"))
    rng, count = random.Random(5), 200 if device == "cuda" else 8
    asked = [make_recall_prompt(rng, rng.choice((12, 40, 90, 200, 440))) for _ in range(count)]
    requests = [
        LoadRequest(
            f"r{i}", tuple(tokenizer.encode(p.text).ids), SamplingParams(temperature=0.0, seed=i, max_tokens=16)
        )
        for i, p in enumerate(asked)
    ]
    shape = {"device": device, "dtype": "bfloat16", "max_model_len": WINDOW, "prefill_blocks": 256}
    alone = run_one_by_one(LocalCluster(SHIPPED_MODEL, **shape, decode_blocks=256), requests)
    load = run_under_load(LocalCluster(SHIPPED_MODEL, **shape, decode_blocks=256, max_num_seqs=SEQS), requests)
    chunks = run_under_load(LocalCluster(SHIPPED_MODEL, **shape, decode_blocks=64, max_num_batched_tokens=64), requests)
    answers = {name: tokenizer.decode(ids).strip() for name, ids in alone.items()}
    right = sum(answers[f"r{i}"].startswith(p.answer) for i, p in enumerate(asked))
    assert right >= 0.9 * count
    assert differing(alone, load) == []
    assert differing(alone, chunks) == []
