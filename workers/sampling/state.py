"""What sampling knows of one sequence, and when the sequence ends."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from workers.grammars.matcher import TokenMatcher
from workers.messages import FinishReason, WorkerRequest
from workers.sampling_params import SamplingParams
from workers.token_ids import TokenIds


@dataclass(eq=False)
class SamplingState:
    """One sequence as the sampler sees it.

    Everything here follows from the request and its tokens, so a decode worker that is told the first token
    stands exactly where the prefill worker stood: no generator state is handed over.

    Attributes:
        params: the request's parameters, with `seed` set.
        prompt_token_ids: (n,) int32, the prompt: nothing here looks at it but for its length and a penalty.
        eos_token_ids: the model's end-of-sequence tokens.
        max_model_len: the context window in tokens, prompt and output together.
        output_token_ids: tokens generated so far; the worker appends each one that it accepts.
        matcher: where they are in the grammar that the request asks for; None: it asks for none.

    Raises:
        ValueError: `params.seed` is not set.
    """

    params: SamplingParams
    prompt_token_ids: TokenIds
    eos_token_ids: frozenset[int]
    max_model_len: int
    output_token_ids: list[int] = field(default_factory=list)
    matcher: TokenMatcher | None = None
    nothing_left: str | None = None
    """Why no token may come next, where its mask has none."""
    stop_ids: frozenset[int] = field(init=False)
    """Tokens that end the text: the stop tokens, and end-of-sequence unless it is ignored."""
    penalized: bool = field(init=False)
    """Whether any penalty changes the logits."""
    masked: bool = field(init=False)
    """Whether the tokens so far say which one may come next: a grammar does, and a bad word of several tokens."""
    biased: bool = field(init=False)
    """Whether something is added to the logits at every step, or tokens are ruled out there."""
    _plain: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        params = self.params
        if params.seed is None:
            raise ValueError("SamplingParams.seed must be set before sampling")
        eos = frozenset[int]() if params.ignore_eos else self.eos_token_ids
        self.stop_ids = eos | frozenset(params.stop_token_ids)
        self.penalized = (
            params.repetition_penalty != 1.0 or params.frequency_penalty != 0.0 or params.presence_penalty != 0.0
        )
        bad_words = params.bad_words_token_ids
        self.masked = self.matcher is not None or any(len(word) > 1 for word in bad_words)
        self.biased = bool(params.logit_bias or params.allowed_token_ids or any(len(word) == 1 for word in bad_words))
        changed = self.penalized or self.masked or self.biased
        self._plain = params.greedy and not changed and params.logprobs is None

    @classmethod
    def of(
        cls,
        request: WorkerRequest,
        eos_token_ids: Iterable[int],
        max_model_len: int,
        matcher: TokenMatcher | None = None,
    ) -> SamplingState:
        """Of a request that has just come, with the tokens that other workers have generated for it before."""
        num_prompt = len(request.prompt_token_ids) - request.num_output_tokens
        return cls(
            request.sampling,
            request.prompt_token_ids[:num_prompt],
            frozenset(eos_token_ids),
            max_model_len,
            request.prompt_token_ids[num_prompt:].tolist(),
            matcher,
        )

    @property
    def seed(self) -> int:
        """The request's seed."""
        assert self.params.seed is not None  # checked when the state was made
        return self.params.seed

    @property
    def looks_at_prompt(self) -> bool:
        """Whether tokens of the prompt are penalised: only the repetition penalty does so."""
        return self.params.repetition_penalty != 1.0

    def needs_marks_after(self, num_output: int) -> bool:
        """Whether the token after `num_output` ones depends on which came before, or on which end the text."""
        return self.penalized or (num_output < self.params.min_tokens and not self.masked)

    def plain_greedy_after(self, num_output: int) -> bool:
        """Whether the token after `num_output` ones is the argmax of the logits as they are, and all that is wanted."""
        return self._plain and num_output >= self.params.min_tokens


def finish_reason(state: SamplingState) -> FinishReason | None:
    """Why the sequence ends with its last output token, or None if it goes on.

    A function of the token history alone: prefill (after the first token) and decode (after every other one)
    ask it and cannot disagree. A token that ends the text wins over the length limits.
    """
    num_output = len(state.output_token_ids)
    if num_output == 0:
        return None
    params = state.params
    last = state.output_token_ids[-1]
    if num_output > params.min_tokens and last in state.stop_ids:
        return FinishReason.STOP
    if params.structured_output is not None and last in state.eos_token_ids:
        return FinishReason.STOP  # the grammar is complete, and left nothing else, see `token_masks`
    if params.max_tokens is not None and num_output >= params.max_tokens:
        return FinishReason.LENGTH
    if len(state.prompt_token_ids) + num_output >= state.max_model_len:
        return FinishReason.LENGTH
    return None
