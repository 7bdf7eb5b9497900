"""Log-probabilities of the chosen and the most likely tokens, of the model's own distribution, left on the device."""

from __future__ import annotations

import torch

from workers.sampling.ops.logprob_types import TopLogprobs
from workers.sampling.ops.row_params import unpack


def top_logprobs(logits: torch.Tensor, words: torch.Tensor, tokens: torch.Tensor, most: int) -> TopLogprobs:
    """The log-softmax of the logits at the tokens that the rows ask for.

    Args:
        logits: (N, V) bf16, fp16 or fp32; the elements of a row contiguous.
        words: int32 (N, WORDS), see `workers.sampling.ops.row_params`; its `LOGPROBS` is how many a row wants.
        tokens: int64 (N,), the chosen ones; rows with -1 have none.
        most: n, the most that any row wants; at most V.
    """
    if not logits.is_cuda:
        return top_logprobs_torch(logits, words, tokens, most)
    from workers.sampling.ops.triton.top_logprobs import launch_top_logprobs

    return launch_top_logprobs(logits, words, tokens, most)


def top_logprobs_torch(logits: torch.Tensor, words: torch.Tensor, tokens: torch.Tensor, most: int) -> TopLogprobs:
    """`top_logprobs` in plain torch."""
    result = TopLogprobs(
        torch.zeros(tokens.shape, dtype=torch.float32, device=logits.device),
        torch.zeros((len(tokens), most), dtype=torch.int64, device=logits.device),
        torch.zeros((len(tokens), most), dtype=torch.float32, device=logits.device),
    )
    asking = ((unpack(words).logprobs >= 0) & (tokens >= 0)).nonzero().squeeze(1)
    if len(asking):
        logprobs = logits[asking].float().log_softmax(dim=-1)
        result.chosen[asking] = logprobs.gather(1, tokens[asking].unsqueeze(1)).squeeze(1)
        if most:
            ordered, token_ids = logprobs.sort(dim=-1, descending=True, stable=True)
            result.token_ids[asking], result.values[asking] = token_ids[:, :most], ordered[:, :most]
    return result
