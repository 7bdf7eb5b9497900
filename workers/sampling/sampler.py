"""From logits to tokens, for a whole batch at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from workers.errors import SamplingError
from workers.messages import TokenLogprob
from workers.sampling.filters import filter_min_p, filter_top_k, filter_top_p
from workers.sampling.noise import gumbel_noise, noise_key
from workers.sampling.penalties import apply_penalties
from workers.sampling.state import SamplingState


class SampledToken(NamedTuple):
    """A chosen token.

    `logprob` and `top_logprobs` (most likely first) are of the model's own distribution, before penalties, temperature
    and filters. The chosen token need not be among the top ones.
    """

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[TokenLogprob, ...] = ()


@torch.inference_mode()
def sample(logits: torch.Tensor, states: Sequence[SamplingState]) -> list[SampledToken]:
    """Choose the next token of every sequence.

    In vLLM's order: log-probabilities are those of the raw logits; then `min_tokens` masks the tokens that end the
    text, then penalties; then greedy sequences take the argmax (of equal logits, the lowest id), and the others apply
    temperature, min-p, top-k, top-p and draw. The draw depends on the sequence's seed and the number of its
    output tokens only.

    Args:
        logits: float32 (N, V), left as it is.
        states: N sequences; left as they are, the caller appends what it accepts.

    Raises:
        SamplingError: rows with NaN or infinite logits, or without a token to choose; it names them.
        ValueError: `logits` has another shape or dtype.
    """
    if logits.dtype != torch.float32 or logits.dim() != 2 or logits.shape[0] != len(states):
        raise ValueError(f"logits are {logits.dtype} {tuple(logits.shape)}, expected float32 ({len(states)}, V)")
    if not states:
        return []
    if all(state.plain_greedy for state in states):
        best, token_ids = logits.max(dim=-1)
        return [SampledToken(token_id) for token_id in _chosen(token_ids, best.isfinite())]

    usable = logits.amax(dim=-1).isfinite()
    scores = logits.clone()
    _mask_stop_tokens(scores, states)
    penalized = [row for row, state in enumerate(states) if state.penalized]
    if penalized:
        chosen_states = [states[row] for row in penalized]
        apply_penalties(
            scores, penalized, [state.params for state in chosen_states], [state.history() for state in chosen_states]
        )
    _randomize(scores, states)
    best, token_ids = scores.max(dim=-1)
    chosen = _chosen(token_ids, usable & best.isfinite())
    return _with_logprobs(logits, states, chosen)


def _chosen(token_ids: torch.Tensor, usable: torch.Tensor) -> list[int]:
    """Bring the token ids to the host, in one transfer together with the check that they mean something."""
    chosen: list[int] = torch.where(usable, token_ids, -1).tolist()
    bad = tuple(row for row, token_id in enumerate(chosen) if token_id < 0)
    if bad:
        raise SamplingError(
            f"no token can be chosen for {len(bad)} of {len(chosen)} sequences (rows {_listed(bad)}): "
            "the model's logits contain NaN or infinity, or every token is masked",
            rows=bad,
        )
    return chosen


def _listed(rows: Sequence[int]) -> str:
    shown = ", ".join(map(str, rows[:8]))
    return f"{shown}, …" if len(rows) > 8 else shown


def _mask_stop_tokens(scores: torch.Tensor, states: Sequence[SamplingState]) -> None:
    """Set the tokens that end the text to -inf, in place, where `min_tokens` is not reached yet."""
    vocab_size = scores.shape[1]
    # A stop token outside the vocabulary can never be chosen; as an index it would be an error.
    pairs = [
        (row, token_id)
        for row, state in enumerate(states)
        if state.below_min_tokens
        for token_id in state.stop_ids
        if 0 <= token_id < vocab_size
    ]
    if pairs:
        row_ids, token_ids = torch.tensor(pairs, device=scores.device).unbind(dim=1)
        scores[row_ids, token_ids] = float("-inf")


def _randomize(scores: torch.Tensor, states: Sequence[SamplingState]) -> None:
    """Turn the rows that are not greedy, in place, into scores whose argmax is a draw from their distribution."""
    rows = [row for row, state in enumerate(states) if not state.params.greedy]
    if not rows:
        return
    device, vocab_size = scores.device, scores.shape[1]
    params = [states[row].params for row in rows]
    everything = len(rows) == len(states)
    index = slice(None) if everything else torch.tensor(rows, device=device)
    drawn = scores[index]
    # Relative to the maximum, so that no temperature can overflow.
    drawn = drawn - drawn.amax(dim=-1, keepdim=True)
    drawn = drawn / torch.tensor([p.temperature for p in params], dtype=torch.float32, device=device).unsqueeze(1)
    drawn = _filter_rows(drawn, [p.min_p if p.min_p > 0.0 else None for p in params], torch.float32, filter_min_p)
    drawn = _filter_rows(
        drawn, [p.top_k if 0 < p.top_k < vocab_size else None for p in params], torch.int64, filter_top_k
    )
    drawn = _filter_rows(drawn, [p.top_p if p.top_p < 1.0 else None for p in params], torch.float32, filter_top_p)
    keys = [noise_key(states[row].seed, len(states[row].output_token_ids)) for row in rows]
    scores[index] = drawn.add_(gumbel_noise(keys, vocab_size, device))


def _filter_rows(
    scores: torch.Tensor,
    values: Sequence[float | None],
    dtype: torch.dtype,
    keep: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Apply a filter to the rows that have a value for it; the others cost nothing."""
    given = [value for value in values if value is not None]
    if not given:
        return scores
    value_tensor = torch.tensor(given, dtype=dtype, device=scores.device)
    if len(given) == len(values):
        return keep(scores, value_tensor)
    rows = torch.tensor([row for row, value in enumerate(values) if value is not None], device=scores.device)
    scores[rows] = keep(scores[rows], value_tensor)
    return scores


def _with_logprobs(logits: torch.Tensor, states: Sequence[SamplingState], chosen: list[int]) -> list[SampledToken]:
    """Add log-probabilities, from the raw logits, for the sequences that ask for them."""
    tokens = [SampledToken(token_id) for token_id in chosen]
    wanted = {row: n for row, state in enumerate(states) if (n := state.params.logprobs) is not None}
    if not wanted:
        return tokens
    rows = list(wanted)
    raw = logits[torch.tensor(rows, device=logits.device)]
    norm = raw.logsumexp(dim=-1, keepdim=True)
    chosen_ids = torch.tensor([chosen[row] for row in rows], device=logits.device).unsqueeze(1)
    chosen_logprobs: list[float] = (raw.gather(1, chosen_ids) - norm).squeeze(1).tolist()
    top = raw.topk(min(max(wanted.values()), raw.shape[1]), dim=-1)
    top_ids: list[list[int]] = top.indices.tolist()
    top_logprobs: list[list[float]] = (top.values - norm).tolist()
    for row, logprob, ids, logprobs in zip(rows, chosen_logprobs, top_ids, top_logprobs, strict=True):
        n = wanted[row]
        pairs = tuple(TokenLogprob(i, value) for i, value in zip(ids[:n], logprobs[:n], strict=True))
        tokens[row] = SampledToken(chosen[row], logprob, pairs)
    return tokens
