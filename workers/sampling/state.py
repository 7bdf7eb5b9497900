"""What sampling knows of one sequence, and when the sequence ends."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

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

    Raises:
        ValueError: `params.seed` is not set.
    """

    params: SamplingParams
    prompt_token_ids: TokenIds
    eos_token_ids: frozenset[int]
    max_model_len: int
    output_token_ids: list[int] = field(default_factory=list)
    stop_ids: frozenset[int] = field(init=False)
    """Tokens that end the text: the stop tokens, and end-of-sequence unless it is ignored."""
    penalized: bool = field(init=False)
    """Whether any penalty changes the logits."""
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
        self._plain = params.greedy and not self.penalized and params.logprobs is None

    @classmethod
    def of(
        cls, request: WorkerRequest, eos_token_ids: Iterable[int], max_model_len: int, index: int = 0
    ) -> SamplingState:
        """Of a sample of a request that has just come, with the tokens that other workers have generated before."""
        num_prompt = len(request.prompt_token_ids) - request.num_output_tokens
        return cls(
            request.sampling.of_sample(index),
            request.prompt_token_ids[:num_prompt],
            frozenset(eos_token_ids),
            max_model_len,
            request.prompt_token_ids[num_prompt:].tolist(),
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
        return self.penalized or num_output < self.params.min_tokens

    def plain_greedy_after(self, num_output: int) -> bool:
        """Whether the token after `num_output` ones is the argmax of the logits as they are, and all that is wanted."""
        return self._plain and num_output >= self.params.min_tokens


def sample_states(
    request: WorkerRequest, eos_token_ids: Iterable[int], max_model_len: int
) -> tuple[SamplingState, ...]:
    """One for each sample of a request that has just come."""
    eos = frozenset(eos_token_ids)
    return tuple(SamplingState.of(request, eos, max_model_len, index) for index in range(request.sampling.n))


def finish_reason(state: SamplingState) -> FinishReason | None:
    """Why the sequence ends with its last output token, or None if it goes on.

    A function of the token history alone: prefill (after the first token) and decode (after every other one)
    ask it and cannot disagree. A token that ends the text wins over the length limits.
    """
    num_output = len(state.output_token_ids)
    if num_output == 0:
        return None
    params = state.params
    if num_output > params.min_tokens and state.output_token_ids[-1] in state.stop_ids:
        return FinishReason.STOP
    if params.max_tokens is not None and num_output >= params.max_tokens:
        return FinishReason.LENGTH
    if len(state.prompt_token_ids) + num_output >= state.max_model_len:
        return FinishReason.LENGTH
    return None
