"""Fixtures for workers in one process and one thread (`local_cluster`), models driven by hand, and transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

from local_cluster import LocalCluster
from paged_run import PagedRun
from workers.decode_worker import DecodeWorker
from workers.prefill_worker import PrefillWorker


@pytest.fixture(params=[0, 1], ids=["step by step", "one step ahead"])
def steps_ahead(request) -> int:
    """How many steps a decode worker keeps in flight while it launches the next."""
    return request.param


@pytest.fixture
def local_cluster(steps_ahead) -> Callable[..., LocalCluster]:
    """The class, so that a test gives its own sizes and faults; decode runs step by step and ahead in turn."""
    return partial(LocalCluster, steps_ahead=steps_ahead)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    """Every device that the engine runs on."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return request.param


@pytest.fixture
def one_pair(tiny_checkpoint, local_cluster) -> Callable[..., tuple[LocalCluster, PrefillWorker, DecodeWorker]]:
    """`one_pair(**sizes)`: a cluster with its only prefill and its only decode worker."""

    def make(**kwargs):
        cluster = local_cluster(tiny_checkpoint("llama"), **kwargs)
        (prefill,), (decode,) = cluster.prefill.values(), cluster.decode.values()
        return cluster, prefill, decode

    return make


class Clock:
    """A clock for workers that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(LocalCluster, "clock", clock)
    return clock


class Reference:
    """The same checkpoint in transformers, float32. What it has answered once it does not compute again."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        self.model.eval()
        self._logits: dict[tuple[int, ...], torch.Tensor] = {}
        self._greedy: dict[tuple[int, ...], list[int]] = {}

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        if tuple(ids) not in self._logits:
            with torch.inference_mode():
                self._logits[tuple(ids)] = self.model(torch.tensor([list(ids)])).logits[0]
        return self._logits[tuple(ids)].clone()

    def greedy(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        if len(self._greedy.get(tuple(prompt), [])) < num_tokens:
            self._greedy[tuple(prompt)] = self._generate(prompt, num_tokens)
        return self._greedy[tuple(prompt)][:num_tokens]

    def _generate(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        ids = torch.tensor([list(prompt)])
        with torch.inference_mode():
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                do_sample=False,
                eos_token_id=None,
            )
        tokens: list[int] = out[0, len(prompt) :].tolist()
        return tokens


@pytest.fixture
def paged_run() -> type[PagedRun]:
    return PagedRun


@pytest.fixture(scope="session")
def reference() -> Callable[[Path], Reference]:
    """`reference(checkpoint)`: loaded once, unless its files change."""
    loaded: dict[tuple[Path, tuple[int, ...]], Reference] = {}

    def load(folder: Path) -> Reference:
        key = (folder, tuple(file.stat().st_mtime_ns for file in sorted(folder.iterdir())))
        if key not in loaded:
            loaded[key] = Reference(folder)
        return loaded[key]

    return load
