"""What is sent: prompts, output lengths and seeds, reproducible from one seed."""

from __future__ import annotations

import random
from dataclasses import dataclass

from benchmarks.distributions import Distribution
from cluster.recall import make_recall_prompt
from workers.errors import ConfigError
from workers.sampling_params import SamplingParams

PROMPT_KINDS = ("random", "recall")


@dataclass(frozen=True)
class RequestSpec:
    """One request before it is sent.

    Attributes:
        index: its number, from 0.
        token_ids: the prompt, if it is token ids.
        text: the prompt, if it is a text.
        answer: what a right answer begins with; None where there is no right one.
        sampling: how to generate, `max_tokens` included.
    """

    index: int
    token_ids: tuple[int, ...] | None
    text: str | None
    answer: str | None
    sampling: SamplingParams


@dataclass(frozen=True)
class Workload:
    """Makes any number of requests. Request `index` depends on the workload's values and `index` alone.

    Attributes:
        prompt_tokens: lengths of the prompts.
        output_tokens: lengths of the answers.
        seed: of everything random.
        vocab_size: prompts are token ids below it.
        max_model_len: lengths that do not fit in it together are cut, the prompt first.
        prompts: "random" token ids, or "recall" texts for the shipped model.
        temperature: of sampling.
        ignore_eos: generate every token that was asked for.

    Raises:
        ConfigError: even the shortest request is longer than the context window.
    """

    prompt_tokens: Distribution
    output_tokens: Distribution
    seed: int
    vocab_size: int
    max_model_len: int
    prompts: str = "random"
    temperature: float = 0.0
    ignore_eos: bool = True

    def __post_init__(self) -> None:
        least = self.prompt_tokens.least + self.output_tokens.least
        if least > self.max_model_len:
            raise ConfigError(
                f"the shortest request has {least} tokens of prompt and answer together, "
                f"the model's context window has {self.max_model_len}"
            )

    def request(self, index: int) -> RequestSpec:
        """Request number `index`."""
        rng = random.Random(f"{self.seed}/{index}")
        wanted_output = self.output_tokens.sample(rng)
        num_prompt = min(self.prompt_tokens.sample(rng), self.max_model_len - self.output_tokens.least)
        sampling = SamplingParams(
            temperature=self.temperature,
            seed=rng.getrandbits(63),
            ignore_eos=self.ignore_eos,
            max_tokens=min(wanted_output, self.max_model_len - num_prompt),
        )
        if self.prompts == "recall":
            prompt = make_recall_prompt(rng, num_prompt)
            return RequestSpec(index, None, prompt.text, prompt.answer, sampling)
        token_ids = tuple(rng.randrange(self.vocab_size) for _ in range(num_prompt))
        return RequestSpec(index, token_ids, None, None, sampling)
