"""Thousands of handoffs between two processes over NIXL, with random cancels: no block leaks, no answer is wrong."""

from __future__ import annotations

import random
import time
from collections import Counter

import pytest

from pair_gateway import PairGateway
from worker_process import WorkerProcess
from workers.sampling_params import SamplingParams

OUTPUT = 5


@pytest.mark.nixl
def test_no_block_leaks_and_no_answer_is_wrong(device, tiny_checkpoint, reference_greedy, record_property):
    """Every prompt's answer is known: a block that is wrong, late or another's would change it.

    Both pools are so small that blocks are used again at once, and decode moves sequences to host memory.
    """
    handoffs, in_flight, distinct = (10_000, 96, 48) if device == "cuda" else (150, 24, 10)
    rng = random.Random(9)
    checkpoint = tiny_checkpoint("llama")
    prompts = [[rng.randrange(3, 512) for _ in range(rng.randint(1, 90))] for _ in range(distinct)]
    answers = [reference_greedy(checkpoint, prompt, OUTPUT) for prompt in prompts]
    shape = {
        "model": str(checkpoint),
        "dtype": "float32",
        "device": device,
        "threads": 1,
        "max_model_len": 128,
        "max_num_seqs": 32,
    }
    prefill = WorkerProcess(name="prefill-0", role="prefill", num_blocks=120, max_num_batched_tokens=512, **shape)
    decode = WorkerProcess(name="decode-0", role="decode", num_blocks=90, **shape)
    try:
        prefill.wait_ready()
        decode.wait_ready()
        gateway = PairGateway(prefill, decode, rng)
        started = time.monotonic()
        expected, cancelled = storm(gateway, rng, prompts, answers, handoffs, in_flight)
        gateway.wait_idle(30.0)
        took = time.monotonic() - started
        outcome = Counter(
            "cancelled" if asked.cancelled else "failed" if asked.failure else "whole"
            for asked in gateway.asked.values()
        )
        record_property("handoffs", f"{dict(outcome)} in {took:.1f} s")
        print(f"{device}: {handoffs} handoffs in {took:.1f} s: {dict(outcome)}, {cancelled} cancels sent")
        failures = [asked for asked in gateway.asked.values() if asked.failure]
        assert not failures, failures[:5]
        for name, answer in expected.items():
            asked = gateway.asked[name]
            if asked.cancelled:  # some of it may be there; a decoded token may have come before the first one
                tokens = answer[1:] if asked.first is None else answer
                assert asked.tokens == tokens[: len(asked.tokens)], name
            else:
                assert asked.tokens == answer, name
        assert outcome["whole"] > handoffs / 2
        assert outcome["cancelled"] > handoffs / 10
        for worker in (prefill, decode):
            worker.call("close")
    finally:
        prefill.kill()
        decode.kill()


def storm(
    gateway: PairGateway,
    rng: random.Random,
    prompts: list[list[int]],
    answers: list[list[int]],
    handoffs: int,
    in_flight: int,
) -> tuple[dict[str, list[int]], int]:
    """Send all requests, so many at a time, and cancel some of them at any moment: (answer of each, cancels sent)."""
    expected: dict[str, list[int]] = {}
    cancels = 0
    for number in range(handoffs):
        name, which, length = f"r{number}", rng.randrange(len(prompts)), rng.randint(1, OUTPUT)
        expected[name] = answers[which][:length]
        gateway.submit(
            name, prompts[which], SamplingParams(temperature=0.0, seed=0, max_tokens=length, ignore_eos=True)
        )
        if rng.random() < 0.1:  # at once
            gateway.cancel(name)
            cancels += 1
        if rng.random() < 0.2:  # somewhere between its prompt and its last token
            victim = rng.choice(list(expected)[-in_flight:])
            gateway.cancel(victim)
            cancels += 1
        gateway.run_until_open(in_flight, 60.0)
        if rng.random() < 0.3:
            gateway.take(0.0)
    gateway.run_until_open(0, 60.0)
    return expected, cancels
