"""Choosing the next token of every row of a batch, whatever each asks for, left on the device."""

from __future__ import annotations

import torch

from workers.sampling.ops.choice_rows import ChoiceRows
from workers.sampling.ops.filters import filter_min_p, filter_top_k, filter_top_p
from workers.sampling.ops.noise import gumbel_noise, noise_keys
from workers.sampling.ops.penalties import OUTPUT, apply_marks
from workers.sampling.ops.restrictions import num_words, restrict
from workers.sampling.ops.row_params import RowParams, unpack


def sample_tokens(logits: torch.Tensor, rows: ChoiceRows, tokens: torch.Tensor) -> None:
    """Replace the most likely token of every row by the one that its parameters choose.

    In vLLM's order: biases and masks; `min_tokens` masks the tokens that end the text, then penalties; then greedy
    rows take the argmax (of equal scores, the lowest id), and the others apply temperature, min-p, top-k, top-p and
    draw. The draw depends on the row's noise stream and the number of its output tokens only. Tokens are ordered by
    their score before temperature: a division that rounds two scores to the same leaves their order.

    Args:
        logits: (N, V) bf16, fp16 or fp32; the elements of a row contiguous.
        rows: how each row wants it.
        tokens: int64 (N,), of `greedy_sample` from these logits, changed in place; -1 stays, and comes where every
            token is masked.

    Raises:
        ValueError: arguments that do not fit each other.
    """
    _check(logits, rows, tokens)
    if not logits.is_cuda:
        sample_tokens_torch(logits, rows, tokens)
        return
    from workers.sampling.ops.triton.sample_tokens import launch_sample_tokens

    launch_sample_tokens(logits, rows, tokens)


def sample_tokens_torch(logits: torch.Tensor, rows: ChoiceRows, tokens: torch.Tensor) -> None:
    """`sample_tokens` in plain torch."""
    params = unpack(rows.words)
    num_output = rows.seq_lens - params.prompt_len - 1
    scores = restrict(logits.float(), rows, params)
    marked = (params.slot >= 0).nonzero().squeeze(1)
    if len(marked):
        some = RowParams(*(p[marked] for p in params))
        marks = rows.marks[some.slot.long()]
        scores = scores.index_copy(0, marked, apply_marks(scores[marked], marks, some, num_output[marked]))
    drawn = (params.temperature > 0).nonzero().squeeze(1)
    if len(drawn):
        some = RowParams(*(p[drawn] for p in params))
        scores = scores.index_copy(0, drawn, _randomized(scores[drawn], some, num_output[drawn]))
    best, token_ids = scores.max(dim=-1)
    tokens.copy_(torch.where((tokens >= 0) & best.isfinite(), token_ids, -1))
    counted = marked[tokens[marked] >= 0]
    places = params.slot[counted].long(), tokens[counted]
    rows.marks.index_put_(places, torch.full_like(counted, OUTPUT, dtype=torch.int32), accumulate=True)


def _randomized(scores: torch.Tensor, params: RowParams, num_output: torch.Tensor) -> torch.Tensor:
    """Scores whose argmax is a draw from their distribution."""
    # Relative to the maximum, so that no temperature can overflow.
    drawn = (scores - scores.amax(dim=-1, keepdim=True)) * params.temperature.reciprocal().unsqueeze(1)
    dropped = torch.zeros_like(drawn, dtype=torch.bool)
    if (params.log_min_p > float("-inf")).any():
        dropped |= filter_min_p(drawn, params.log_min_p.exp()).isneginf()
    limited = (params.top_k > 0).nonzero().squeeze(1)
    if len(limited):
        kept = filter_top_k(scores[limited], params.top_k[limited].long())
        dropped[limited] |= kept.isneginf()
    drawn = drawn.masked_fill(dropped, float("-inf"))
    nucleus = (params.top_p < 1).nonzero().squeeze(1)
    if len(nucleus):
        drawn[nucleus] = filter_top_p(drawn[nucleus], params.top_p[nucleus])
    return drawn + gumbel_noise(noise_keys(params.stream, num_output), scores.shape[1])


def _check(logits: torch.Tensor, rows: ChoiceRows, tokens: torch.Tensor) -> None:
    count = tokens.shape[0]
    if logits.dim() != 2 or logits.shape[0] != count or logits.stride(1) != 1:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} with strides {logits.stride()}: "
            f"needs ({count}, vocabulary) with contiguous rows"
        )
    if tokens.dtype != torch.int64 or not tokens.is_contiguous():
        raise ValueError(f"tokens of {tokens.dtype}: needs contiguous int64")
    if rows.words.shape[0] != count or rows.seq_lens.shape != (count,):
        raise ValueError(
            f"words of shape {tuple(rows.words.shape)} and seq_lens of shape {tuple(rows.seq_lens.shape)} "
            f"for {count} rows"
        )
    vocab_size = logits.shape[1]
    if rows.marks.shape[1] != vocab_size:
        raise ValueError(f"marks of shape {tuple(rows.marks.shape)} for a vocabulary of {vocab_size}")
    if rows.bias is not None and rows.bias.shape[1] != vocab_size:
        raise ValueError(f"bias of shape {tuple(rows.bias.shape)} for a vocabulary of {vocab_size}")
    if rows.masks is not None and (len(rows.masks) < count or rows.masks.shape[1] != num_words(vocab_size)):
        raise ValueError(f"masks of shape {tuple(rows.masks.shape)} for {count} rows of {vocab_size} tokens")
