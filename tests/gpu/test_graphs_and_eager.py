"""CUDA graphs on and off: the same kernels, hence the same bits, whatever happens to the batch."""

from __future__ import annotations

import random
from collections import deque

import pytest
import torch

from local_cluster import LocalCluster
from logits_tap import LogitsTap
from one_gpu import Decoding, OneGpu
from request_load import mixed_requests, run_under_load
from shapes import MEDIUM
from workers.kv_cache.block_pool import blocks_for
from workers.models.loader import load_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

WINDOW, BLOCKS = 512, 1024


def play(one: OneGpu, script: random.Random, size: int, steps: int, vocab: int) -> list[tuple[list[int], torch.Tensor]]:
    """Decode for some steps in batches of about `size`: tokens and logits of every step.

    Sequences join and leave, grow over the ends of their blocks, and go to pinned memory and come back into other
    blocks.
    """
    free = deque(range(BLOCKS))
    script.shuffle(free)
    running: list[Decoding] = []
    away: list[tuple[Decoding, torch.Tensor]] = []
    seen = []
    for step in range(steps):
        while len(running) + len(away) < size:
            prompt = [script.randrange(3, vocab) for _ in range(script.choice((1, 15, 16, 17, 40, 130)))]
            sequence = Decoding(prompt, [free.popleft() for _ in range(blocks_for(len(prompt) + 1, 16))])
            sequence.tokens.append(int(one.prefill(sequence).argmax()))
            running.append(sequence)
        if step % 3 == 2:  # some go, some come back; on their way they take no part
            for sequence, data in away:
                sequence.blocks = [free.popleft() for _ in range(data.shape[1])]
                one.runner.write_blocks(sequence.blocks, data)
                running.append(sequence)
            away = []
            for sequence in script.sample(running, len(running) // 4):
                running.remove(sequence)
                away.append((sequence, one.runner.read_blocks(sequence.blocks)))
                free.extend(sequence.blocks)
        for sequence in running:
            missing = blocks_for(len(sequence.tokens), 16) - len(sequence.blocks)
            sequence.blocks += [free.popleft() for _ in range(missing)]
        logits = one.decode(running)
        seen.append(([sequence.tokens[-1] for sequence in running], logits))
        for sequence in script.sample(running, script.randint(0, max(1, len(running) // 8))):
            running.remove(sequence)
            free.extend(sequence.blocks)
    return seen


@pytest.mark.parametrize("size", [1, 3, 8, 33, 64])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_steps_have_the_same_bits(size, dtype, tiny_checkpoint):
    model = load_model(tiny_checkpoint("llama", **MEDIUM), dtype, "cuda", backend_name="TRITON_ATTN")
    runs = []
    for enforce_eager in (True, False):
        one = OneGpu(model, num_blocks=BLOCKS, max_num_seqs=64, max_model_len=WINDOW, enforce_eager=enforce_eager)
        assert (one.decoder.graphs is None) == enforce_eager
        runs.append(play(one, random.Random(size), size, 40, MEDIUM["vocab_size"]))
    eager, graphs = runs
    assert len(eager) == len(graphs) == 40
    for (tokens, logits), (expected_tokens, expected) in zip(graphs, eager, strict=True):
        assert tokens == expected_tokens
        assert torch.isfinite(expected).all()
        assert torch.equal(logits, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("sampled", [False, True])
def test_a_pair_has_the_same_bits(dtype, sampled, tiny_checkpoint, monkeypatch):
    """Through the scheduler, in a pool too small for the load: every step of both runs has the same batch."""
    requests = mixed_requests(40, vocab_size=4096, longest_prompt=300, longest_output=40, sampled=sampled)
    checkpoint = tiny_checkpoint("llama", **MEDIUM)
    runs = []
    for enforce_eager in (True, False):
        with monkeypatch.context() as patch:
            tap = LogitsTap(patch)
            cluster = LocalCluster(
                checkpoint,
                device="cuda",
                attention_backend="TRITON_ATTN",
                dtype=dtype,
                enforce_eager=enforce_eager,
                prefill_graphs=False,  # they run padded prompts, and matrix products round by their length
                steps_ahead=0,  # how far ahead a step is, is a matter of batches too
                prefill_blocks=256,
                decode_blocks=80,
                max_model_len=WINDOW,
                max_num_seqs=33,
            )
            tokens = run_under_load(cluster, requests)
            runs.append((tokens, tap.batch_sizes, tap.decode))
        cluster.assert_all_blocks_free()
    (tokens, batches, logits), (graph_tokens, graph_batches, graph_logits) = runs
    assert graph_batches == batches
    assert max(batches) > 16
    assert graph_tokens == tokens
    assert graph_logits.keys() == logits.keys()
    for name in logits:
        assert torch.equal(torch.stack(graph_logits[name]), torch.stack(logits[name])), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_sequence_does_not_feel_its_company(dtype, tiny_checkpoint):
    """In batches of one size a sequence has the same bits in every row, beside anybody, and among padding."""
    model = load_model(tiny_checkpoint("llama", **MEDIUM), dtype, "cuda", backend_name="TRITON_ATTN")
    one = OneGpu(model, num_blocks=BLOCKS, max_num_seqs=64, max_model_len=WINDOW)
    rng = random.Random(0)

    def sequence(length: int, first_block: int) -> Decoding:
        made = Decoding([rng.randrange(3, 4096) for _ in range(length)], list(range(first_block, first_block + 10)))
        one.prefill(made)
        made.tokens.append(7)
        return made

    subject = sequence(100, 0)
    others = [sequence(rng.randint(1, 150), 10 * i) for i in range(1, 64)]
    found = []
    for count, place in ((49, 0), (56, 20), (51, 50), (56, 55)):  # all of them run as a step of 56 rows
        company = rng.sample(others, count - 1)
        batch = [*company[:place], subject, *company[place:]]
        lengths = [len(s.tokens) for s in batch]
        for s in batch:
            s.blocks = list(s.blocks)  # another list is another table: nobody goes on where the last step left it
        found.append(one.decode(batch)[batch.index(subject)])
        for s, length in zip(batch, lengths, strict=True):
            del s.tokens[length:]
    for row in found[1:]:
        assert torch.equal(row, found[0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_prefill_has_the_same_bits(dtype, tiny_checkpoint):
    """Of prompts as long as a captured length; shorter ones are padded, and the padding must not be felt."""
    model = load_model(tiny_checkpoint("llama", **MEDIUM), dtype, "cuda", backend_name="TRITON_ATTN")
    eager, graphs = (
        OneGpu(model, num_blocks=40, max_num_seqs=1, max_model_len=WINDOW, longest_prefill=longest, enforce_eager=True)
        for longest in (None, WINDOW)
    )
    rng = random.Random(6)
    for length, padded in ((32, 32), (64, 64), (256, 256), (100, 128), (33, 64), (1, 32)):
        prompt = [rng.randrange(3, 4096) for _ in range(length)]
        blocks = rng.sample(range(40), blocks_for(length, 16))
        found = graphs.prefill(Decoding(prompt, blocks))
        if length == padded:
            assert torch.equal(found, eager.prefill(Decoding(prompt, blocks)))
        else:  # a longer prompt that begins with it, computed in as many rows
            behind = Decoding([*prompt, *([5] * (padded - length))], rng.sample(range(40), blocks_for(padded, 16)))
            eager.prefill(behind)
            ours, theirs = (one.runner.kv_caches[0][:, s.blocks[: len(blocks)]] for one, s in (
                (graphs, Decoding(prompt, blocks)), (eager, behind)))  # fmt: skip
            assert torch.equal(tokens_of(ours, length), tokens_of(theirs, length))


def tokens_of(blocks: torch.Tensor, length: int) -> torch.Tensor:
    """(layers, 2, length, heads, size): the keys and values of the tokens in (layers, n, 2, 16, heads, size) blocks."""
    return blocks.transpose(1, 2).flatten(2, 3)[:, :, :length]
