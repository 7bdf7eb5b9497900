"""What is bit for bit the same whatever is in the batch beside it; docs/correctness.md says what is not, and why."""

from __future__ import annotations

import pytest
import torch

from batch_invariance import DECODE_SIZES, decode_attention, fused_ops, prefill_attention, rows_agree
from one_gpu import Decoding, OneGpu
from shapes import MEDIUM
from workers.models.loader import load_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("name", ["rms_norm", "silu_and_mul"])
def test_fused_operations_see_one_row_at_a_time(name):
    assert rows_agree(fused_ops()[name], (*DECODE_SIZES, 300, 8192))


@pytest.mark.parametrize("context", [5, 200, 4064])
@pytest.mark.parametrize("num_splits", [1, 8])
def test_decode_attention_depends_on_the_number_of_splits_alone(context, num_splits):
    assert rows_agree(decode_attention(context, 256, num_splits), DECODE_SIZES)


@pytest.mark.parametrize("copies", [2, 8])
@pytest.mark.parametrize("length", [100, 700, 3000])
def test_prefill_attention_does_not_feel_other_prompts(length, copies):
    assert torch.equal(prefill_attention(length, None, copies), prefill_attention(length, None))


@pytest.mark.parametrize("length", [700, 3000])
def test_prefill_attention_does_not_feel_large_chunks(length):
    whole = prefill_attention(length, None)
    for chunk in (256, 1000):
        assert torch.equal(prefill_attention(length, chunk), whole)


def test_decode_in_batches_of_one_size_is_batch_invariant(tiny_checkpoint):
    """A ladder with one rung: what a sequence gets does not depend on how many there are."""
    model = load_model(tiny_checkpoint("llama", **MEDIUM), "bfloat16", "cuda", backend_name="TRITON_ATTN")
    one = OneGpu(model, num_blocks=1024, max_num_seqs=64, max_model_len=512, enforce_eager=True, batch_sizes=[64])
    made = [Decoding([(7 * i + j) % 4000 + 3 for j in range(60)], list(range(8 * i, 8 * i + 8))) for i in range(64)]
    for sequence in made:
        one.prefill(sequence)
        sequence.tokens.append(9)
    found = []
    for count in (1, 2, 3, 17, 64):
        for sequence in made:
            sequence.blocks = list(sequence.blocks)
            del sequence.tokens[61:]
        found.append(one.decode(made[:count])[0])
    assert all(torch.equal(row, found[0]) for row in found[1:])
