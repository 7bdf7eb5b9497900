"""How the rows of a decode batch choose their tokens: kept on the device, sent when a sequence takes a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch

from workers.host_copies import to_device
from workers.sampling.ops.choice_rows import ChoiceRows
from workers.sampling.ops.penalties import TokenMarks
from workers.sampling.ops.restrictions import num_words
from workers.sampling.ops.row_params import NO_LOGPROBS, WORDS, pack, unpack
from workers.sampling.ops.sample_tokens import sample_tokens
from workers.sampling.ops.token_bias import TokenBias
from workers.sampling.ops.top_logprobs import top_logprobs
from workers.sampling.results import SampledBatch
from workers.sampling.slots import Slots
from workers.sampling.state import SamplingState
from workers.sampling.token_masks import token_masks

S = TypeVar("S")


def plain_greedy(states: Sequence[SamplingState], num_output: Sequence[int]) -> bool:
    """Whether the tokens after so many output tokens of these sequences are the most likely ones, and all is said."""
    return all(state.plain_greedy_after(count) for state, count in zip(states, num_output, strict=True))


@torch.inference_mode()
def choose(
    logits: torch.Tensor,
    host_words: torch.Tensor,
    words: torch.Tensor,
    seq_lens: torch.Tensor,
    marks: torch.Tensor,
    token_ids: torch.Tensor,
    bias: torch.Tensor | None = None,
    masks: torch.Tensor | None = None,
) -> SampledBatch:
    """Replace the most likely tokens by the chosen ones, and send them to the host with what else is wanted.

    Args:
        logits: (N, V).
        host_words: int32 (N, WORDS), see `workers.sampling.ops.row_params`.
        words: the same on the device.
        seq_lens: int32 (N,), tokens of each row with the one that is chosen here.
        marks: int32 (slots, V).
        token_ids: int64 (N,), of `greedy_sample`; changed.
        bias: float32 (slots, V); None: no row has a slot.
        masks: int32 (at least N, ⌈V / 32⌉); None: no row is masked.
    """
    params = unpack(host_words)
    drawn = params.temperature > 0
    filtered = drawn & ((params.top_k > 0) | (params.top_p < 1) | (params.log_min_p > float("-inf")))
    if (drawn | (params.slot >= 0) | (params.bias_slot >= 0) | (params.masked != 0)).any():
        rows = ChoiceRows(words, seq_lens, marks, bias, masks, bool(filtered.any()))
        sample_tokens(logits, rows, token_ids)
    most = int(params.logprobs.max())
    if most == NO_LOGPROBS:
        return SampledBatch(token_ids)
    return SampledBatch(token_ids, top_logprobs(logits, words, token_ids, min(most, logits.shape[1])))


class SamplingRows(Generic[S]):
    """The parameters and token marks of a batch's rows, which follow the sequences from row to row.

    Args:
        max_num_seqs: rows.
        vocab_size: V.
        state_of: a sequence as the sampler sees it.
        device: where they are.
    """

    def __init__(
        self, max_num_seqs: int, vocab_size: int, state_of: Callable[[S], SamplingState], device: torch.device
    ) -> None:
        self._host_words = torch.zeros(max_num_seqs, WORDS, dtype=torch.int32)
        self._words = self._host_words.to(device, copy=True)
        self._vocab_size = vocab_size
        self._state_of = state_of
        self._marks = TokenMarks(vocab_size, device)
        self._bias = TokenBias(vocab_size, device)
        self._masks: torch.Tensor | None = None
        self._mark_slots, self._bias_slots = Slots[S](self._marks), Slots[S](self._bias)
        self._sent: list[tuple[S, int, int] | None] = [None] * max_num_seqs

    def needs_last_tokens(self, batch: Sequence[S]) -> list[S]:
        """Those whose tokens so far say what may come next: `sample` must be called when they are known."""
        return [sequence for sequence in batch if self._state_of(sequence).masked]

    def sample(
        self,
        batch: Sequence[S],
        lens: Sequence[int],
        logits: torch.Tensor,
        seq_lens: torch.Tensor,
        token_ids: torch.Tensor,
    ) -> SampledBatch:
        """Queue the choice of every row's token.

        Args:
            batch: whose rows they are, in order.
            lens: tokens of each before the one that is chosen here, with those in flight.
            logits: (N, V).
            seq_lens: int32 (N,), tokens of each row with the one that is chosen here, as the device counts them.
            token_ids: int64 (N,), the most likely tokens; the chosen ones afterwards.
        """
        states = [self._state_of(sequence) for sequence in batch]
        num_output = [length - len(state.prompt_token_ids) for length, state in zip(lens, states, strict=True)]
        self._mark_slots.keep(batch)
        self._bias_slots.keep(batch)
        if plain_greedy(states, num_output):
            return SampledBatch(token_ids)
        self._send(batch, states, num_output)
        masks = self._send_masks(states, num_output)
        words = self._host_words[: len(batch)], self._words[: len(batch)]
        return choose(logits, *words, seq_lens, self._marks.tensor, token_ids, self._bias.tensor, masks)

    @torch.inference_mode()
    def _send(self, batch: Sequence[S], states: Sequence[SamplingState], num_output: Sequence[int]) -> None:
        """Tell the device of those who have another row than at the last step, or marks for the first time."""
        pairs = list(zip(batch, states, strict=True))
        self._mark_slots.claim(
            pair for pair, count in zip(pairs, num_output, strict=True) if pair[1].needs_marks_after(count)
        )
        self._bias_slots.claim(pair for pair in pairs if pair[1].biased)
        wanted = [(sequence, self._mark_slots.of(sequence), self._bias_slots.of(sequence)) for sequence in batch]
        rows = [row for row, (now, sent) in enumerate(zip(wanted, self._sent, strict=False)) if now != sent]
        if not rows:
            return
        _, mark_slots, bias_slots = zip(*(wanted[row] for row in rows), strict=True)
        words = pack([states[row] for row in rows], mark_slots, self._vocab_size, bias_slots)
        device = self._words.device
        self._host_words[rows] = words
        self._words.index_copy_(0, to_device(torch.tensor(rows), device), to_device(words, device))
        for row in rows:
            self._sent[row] = wanted[row]

    @torch.inference_mode()
    def _send_masks(self, states: Sequence[SamplingState], num_output: Sequence[int]) -> torch.Tensor | None:
        """Bring the masks of this step to their rows; None: no row has one.

        A row whose tokens did not become what was expected has ended, and nobody looks at its token.
        """
        rows = [row for row, state in enumerate(states) if state.masked]
        if not rows:
            return None
        device = self._words.device
        if self._masks is None:
            shape = (len(self._sent), num_words(self._vocab_size))
            self._masks = torch.full(shape, -1, dtype=torch.int32, device=device)
        known = [row for row in rows if len(states[row].output_token_ids) == num_output[row]]
        masks = torch.from_numpy(token_masks([states[row] for row in known], self._vocab_size))
        self._masks.index_copy_(0, to_device(torch.tensor(known, dtype=torch.int64), device), to_device(masks, device))
        return self._masks
