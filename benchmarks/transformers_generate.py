"""`transformers` on the jobs that the engine gets: one static batch, padded on the left, until its longest output."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine_alone import BatchRun, Job

_PAD = 0


class TransformersGenerate:
    """A checkpoint in `transformers`, with its default attention (SDPA) and cache.

    Args:
        checkpoint: folder.
        dtype: float32, bfloat16 or float16.
    """

    def __init__(self, checkpoint: Path, *, dtype: str = "float32") -> None:
        import transformers

        self._criteria_list = transformers.StoppingCriteriaList
        self._model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype)).eval()

    @torch.inference_mode()
    def run(self, jobs: Sequence[Job]) -> BatchRun:
        """Run some jobs to their ends. Tokens that a job did not ask for are made but not returned."""
        longest = max(len(job.prompt) for job in jobs)
        padding = [longest - len(job.prompt) for job in jobs]
        clock = _TokenClock()
        started = time.perf_counter()
        output = self._model.generate(
            torch.tensor([[_PAD] * pad + list(job.prompt) for pad, job in zip(padding, jobs, strict=True)]),
            attention_mask=torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding]),
            max_new_tokens=max(job.max_tokens for job in jobs),
            do_sample=False,
            eos_token_id=None,
            pad_token_id=_PAD,
            stopping_criteria=self._criteria_list([clock]),
        )
        ended = time.perf_counter()
        tokens = tuple(
            tuple(row[longest : longest + job.max_tokens].tolist()) for row, job in zip(output, jobs, strict=True)
        )
        return BatchRun(tokens, ended - started, ended - clock.first_token)


class _TokenClock:
    """A stopping criterion that stops nothing and remembers when it was first asked: after the first token."""

    def __init__(self) -> None:
        self.first_token = 0.0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Called after every step."""
        self.first_token = self.first_token or time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)
