"""Logits on a GPU against transformers: as near in bf16 as its own bf16 comes, and tight in float32."""

from __future__ import annotations

import gc
import itertools
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from near_ties import logit_error
from one_gpu import Decoding, OneGpu
from shapes import BILLION, save_random_model
from tiny_families import FAMILIES
from workers.kv_cache.block_pool import blocks_for
from workers.models.loader import load_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

FLOAT32_ERROR = 2e-4
BF16_ERROR = 0.06
"""Root mean square, in standard deviations of the logits; usual for bf16 through 16 to 28 layers of random weights."""

ROUTED = {
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe_lite",
    "gpt_oss",
    "llama4",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
}
"""In bf16 a near tie between two experts goes one way here and the other there, so only float32 is compared."""

BLOCK_SIZES = {"llama4": 32}
"""Where it is not 64: its chunks of attention are to be whole blocks."""


def prompts(lengths: tuple[int, ...], vocab: int) -> list[list[int]]:
    rng = random.Random(1)
    return [[rng.randrange(3, vocab) for _ in range(length)] for length in lengths]


def their_logits(
    folder: Path, sequences: list[list[int]], steps: int, dtype: torch.dtype, attention: str
) -> list[torch.Tensor]:
    """(steps, vocab) for each sequence, after each of its last tokens; weights are those of bf16 in any dtype."""
    from transformers import AutoModelForCausalLM

    # Its grouped products ask for rows of multiples of 16 bytes, which the smallest checkpoints have not.
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation=attention, experts_implementation="eager"
    )
    model = model.to("cuda").eval()
    if dtype is torch.float32:  # never down: that would round the frequencies of the rotation, too
        model = model.float()
    with torch.inference_mode():
        logits = [model(torch.tensor([ids], device="cuda")).logits[0, -steps:].float().cpu() for ids in sequences]
    del model
    return logits


def our_logits(
    folder: Path, sequences: list[list[int]], steps: int, dtype: str, chunk: int | None, block_size: int
) -> list[torch.Tensor]:
    """The same: all but the last tokens as prompts, the others decoded together, whatever the model would choose."""
    model = load_model(folder, dtype, "cuda", block_size=block_size)
    tables, used = [], 0
    for ids in sequences:
        count = blocks_for(len(ids) + 1, block_size)
        tables.append(list(range(used, used + count)))
        used += count
    one = OneGpu(model, num_blocks=used, max_num_seqs=8, max_model_len=4096)
    logits: list[list[torch.Tensor]] = []
    batch = []
    for ids, table in zip(sequences, tables, strict=True):
        sequence = Decoding(ids[: len(ids) - steps + 1], table)
        logits.append([one.prefill(sequence, chunk).float()])
        batch.append(sequence)
    for step in range(1, steps):
        for sequence, ids in zip(batch, sequences, strict=True):
            sequence.tokens = ids[: len(ids) - steps + 1 + step]
            sequence.blocks = list(sequence.blocks)  # another list is another table: the step takes the token given
        for rows, row in zip(logits, one.decode(batch), strict=True):
            rows.append(row.float())
    return [torch.stack(rows).cpu() for rows in logits]


def check(
    folder: Path,
    vocab: int,
    lengths: tuple[int, ...],
    name: str,
    record_property,
    dtypes: tuple[str, ...] = ("float32", "bfloat16"),
    attention: str = "sdpa",
    block_size: int = 64,
) -> None:
    steps = 6
    sequences = prompts(lengths, vocab)
    expected = their_logits(folder, sequences, steps, torch.float32, attention)
    theirs = their_logits(folder, sequences, steps, torch.bfloat16, attention)
    for dtype, chunk in itertools.product(dtypes, (None, 200)):
        found = our_logits(folder, sequences, steps, dtype, chunk, block_size)
        errors = [logit_error(ours, right) for ours, right in zip(found, expected, strict=True)]
        usual = [logit_error(other, right) for other, right in zip(theirs, expected, strict=True)]
        line = f"{name} {dtype} chunk {chunk}: error {max(errors):.2e}, transformers' own in bf16 {max(usual):.2e}"
        record_property(f"{name} {dtype} {chunk}", line)
        print(line)
        for error, other in zip(errors, usual, strict=True):
            if dtype == "float32":
                assert error <= FLOAT32_ERROR
            else:
                assert error <= BF16_ERROR
                assert error <= 2 * other
        gc.collect()
        torch.cuda.empty_cache()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tiny_model(family, tiny_checkpoint, tmp_path, record_property):
    folder = Path(shutil.copytree(tiny_checkpoint(family), tmp_path / "rounded"))
    file = folder / "model.safetensors"
    rounded = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    save_file(rounded, file, metadata={"format": "pt"})
    dtypes = ("float32",) if family in ROUTED else ("float32", "bfloat16")
    block_size = BLOCK_SIZES.get(family, 64)
    check(folder, 512, (7, 40, 300), f"tiny {family}", record_property, dtypes, "eager", block_size)


@pytest.mark.parametrize("family", BILLION)
def test_a_model_of_a_billion_parameters(family, tmp_path, record_property):
    save_random_model(tmp_path, family)
    torch.cuda.empty_cache()
    check(tmp_path, 32000, (9, 700, 1500), family, record_property)
