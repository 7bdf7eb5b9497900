"""From logits to tokens, for a batch at once and once: what prefill does, which keeps no rows on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from workers.errors import SamplingError
from workers.host_copies import to_device
from workers.sampling.ops.greedy import greedy_sample
from workers.sampling.ops.penalties import TokenMarks
from workers.sampling.ops.restrictions import num_words
from workers.sampling.ops.row_params import NO_SLOT, pack
from workers.sampling.ops.token_bias import TokenBias
from workers.sampling.results import SampledBatch, SampledToken
from workers.sampling.rows import choose, plain_greedy
from workers.sampling.state import SamplingState
from workers.sampling.token_masks import token_masks


@torch.inference_mode()
def launch_sample(logits: torch.Tensor, states: Sequence[SamplingState]) -> SampledBatch:
    """Queue the choice of every sequence's next token, and the way of the tokens to the host; waits for nothing.

    In vLLM's order: log-probabilities are those of the raw logits; then see `sample_tokens`.

    Args:
        logits: (N, V) fp32, fp16 or bf16, left as it is.
        states: N sequences; left as they are, the caller appends what it accepts.

    Raises:
        ValueError: `logits` has another shape or dtype.
    """
    if not logits.is_floating_point() or logits.dim() != 2 or logits.shape[0] != len(states):
        raise ValueError(f"logits are {logits.dtype} {tuple(logits.shape)}, expected floats ({len(states)}, V)")
    token_ids = greedy_sample(logits)
    num_output = [len(state.output_token_ids) for state in states]
    if plain_greedy(states, num_output):
        return SampledBatch(token_ids)
    vocab_size, device = logits.shape[1], logits.device
    marks, slots = TokenMarks(vocab_size, device), [NO_SLOT] * len(states)
    marked = [row for row, state in enumerate(states) if state.needs_marks_after(num_output[row])]
    for row, slot in zip(marked, marks.claim([states[row] for row in marked]), strict=True):
        slots[row] = slot
    bias, bias_slots = TokenBias(vocab_size, device), [NO_SLOT] * len(states)
    biased = [row for row, state in enumerate(states) if state.biased]
    for row, slot in zip(biased, bias.claim([states[row] for row in biased]), strict=True):
        bias_slots[row] = slot
    seq_lens = [len(state.prompt_token_ids) + count + 1 for state, count in zip(states, num_output, strict=True)]
    words = pack(states, slots, vocab_size, bias_slots)
    lens = to_device(torch.tensor(seq_lens, dtype=torch.int32), device)
    masks = _masks(states, vocab_size, device)
    return choose(logits, words, to_device(words, device), lens, marks.tensor, token_ids, bias.tensor, masks)


def _masks(states: Sequence[SamplingState], vocab_size: int, device: torch.device) -> torch.Tensor | None:
    """What may come in each row that is masked, on the device; None: none is."""
    rows = [row for row, state in enumerate(states) if state.masked]
    if not rows:
        return None
    masks = torch.full((len(states), num_words(vocab_size)), -1, dtype=torch.int32)
    masks[rows] = torch.from_numpy(token_masks([states[row] for row in rows], vocab_size))
    return to_device(masks, device)


def sample(logits: torch.Tensor, states: Sequence[SamplingState]) -> list[SampledToken]:
    """The tokens of `launch_sample`, waited for.

    Raises:
        SamplingError: rows with NaN or infinite logits, or without a token to choose; it names them.
        ValueError: `logits` has another shape or dtype.
    """
    sampled = launch_sample(logits, states).tokens(states)
    tokens = [token for token in sampled if not isinstance(token, SamplingError)]
    if len(tokens) < len(sampled):
        rows = tuple(row for row, token in enumerate(sampled) if isinstance(token, SamplingError))
        shown = ", ".join(map(str, rows[:8])) + (", …" if len(rows) > 8 else "")
        raise SamplingError(
            f"no token can be chosen for {len(rows)} of {len(sampled)} sequences (rows {shown}): "
            "the model's logits contain NaN or infinity, or every token is masked",
            rows=rows,
        )
    return tokens
