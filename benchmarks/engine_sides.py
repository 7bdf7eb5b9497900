"""Baton's workers as the GPU benchmark steps them: built as a service builds them, without peers."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attention.spec import Phase
from benchmarks.device_timing import synchronize
from benchmarks.engine_points import TEMPERATURE, TOP_P
from benchmarks.instant_handoff import InstantConnector
from workers.config import WorkerConfig
from workers.decode_worker import DecodeWorker
from workers.kv_cache.sizing import allocate_kv_caches
from workers.messages import RequestFailed, TokenOutput, WorkerEvent, WorkerRequest
from workers.models.loader import load_model
from workers.prefill_worker import PrefillWorker
from workers.runner.model_runner import ModelRunner
from workers.runner.profile_run import largest_batches_of
from workers.sampling_params import SamplingParams
from workers.token_ids import as_token_ids

_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class StartUp:
    """Seconds that a worker takes to be ready, its process and the import of libraries aside.

    Attributes:
        load: building the model and drawing its weights.
        profile: running its largest batch and allocating the cache.
        capture: building the worker; on decode, capturing its CUDA graphs.
    """

    load: float
    profile: float
    capture: float


class PrefillSide:
    """A prefill worker as a `MeasuredEngine`."""

    def __init__(self, worker: PrefillWorker) -> None:
        self._worker = worker

    def add(self, request_id: str, prompt: Sequence[int], max_tokens: int, sampled: bool) -> None:
        """See `MeasuredEngine.add`; a prefill worker makes one token."""
        self._worker.add(_request(request_id, prompt, max_tokens, sampled, None))

    def step(self) -> int:
        """See `MeasuredEngine.step`."""
        return _tokens(self._worker.step())

    @property
    def busy(self) -> bool:
        """See `MeasuredEngine.busy`."""
        return self._worker.has_requests


class DecodeSide:
    """A decode worker over an `InstantConnector` as a `MeasuredEngine`."""

    def __init__(self, worker: DecodeWorker) -> None:
        self._worker = worker

    def add(self, request_id: str, prompt: Sequence[int], max_tokens: int, sampled: bool) -> None:
        """See `MeasuredEngine.add`."""
        self._worker.add(_request(request_id, prompt, max_tokens, sampled, "alone"))

    def step(self) -> int:
        """See `MeasuredEngine.step`."""
        return _tokens(self._worker.step())

    @property
    def busy(self) -> bool:
        """See `MeasuredEngine.busy`."""
        return self._worker.has_requests


def build_worker(
    config: WorkerConfig, max_model_len: int
) -> tuple[PrefillWorker | DecodeWorker, StartUp, dict[str, Any]]:
    """A worker as `WorkerHost` builds it, but over a connector without peers; how long each phase took; what it is.

    Raises:
        BatonError: it cannot be built here.
    """
    device = torch.device(config.device)
    times = [time.perf_counter()]

    def lap() -> None:
        synchronize(device)
        times.append(time.perf_counter())

    model = load_model(
        config.model,
        config.dtype,
        config.device,
        config.block_size,
        config.attention_backend,
        load_format=config.load_format,
        phase=Phase(config.role),
        expert_weights=config.expert_weights,
    )
    lap()
    profile = largest_batches_of(model, config, max_model_len)
    caches = allocate_kv_caches(config, model.kv_cache_groups, max_model_len, profile)
    for cache in caches:
        for layer in cache:  # zeros can be quicker to work on than data
            layer.normal_(0.0, 0.5)
    runner = ModelRunner(model, caches)
    lap()
    worker: PrefillWorker | DecodeWorker
    if config.role == "prefill":
        worker = PrefillWorker(
            runner,
            InstantConnector(),
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_num_seqs=config.max_num_seqs,
            max_model_len=max_model_len,
            enable_prefix_caching=False,  # a prompt that is measured again is computed again
        )
    else:
        worker = DecodeWorker(
            runner,
            InstantConnector(),
            max_num_seqs=config.max_num_seqs,
            max_model_len=max_model_len,
            enable_prefix_caching=False,  # every sequence has blocks of its own
        )
    lap()
    about = {
        "attention_backend": model.backend_names,
        "kv_blocks": worker.cache.num_blocks,
        "block_size": config.block_size,
    }
    load, profiled, captured = (end - begin for begin, end in itertools.pairwise(times))
    return worker, StartUp(load, profiled, captured), about


def _request(request_id: str, prompt: Sequence[int], max_tokens: int, sampled: bool, peer: str | None) -> WorkerRequest:
    return WorkerRequest(
        request_id=request_id,
        attempt_id=request_id,
        handoff_id=secrets.token_bytes(16),
        prompt_token_ids=as_token_ids(prompt),
        sampling=_params(max_tokens, sampled),
        peer_engine=peer,
        timeout_s=_TIMEOUT_S,
    )


def _params(max_tokens: int, sampled: bool) -> SamplingParams:
    if not sampled:
        return SamplingParams(temperature=0.0, seed=0, max_tokens=max_tokens, ignore_eos=True)
    return SamplingParams(temperature=TEMPERATURE, top_p=TOP_P, seed=0, max_tokens=max_tokens, ignore_eos=True)


def _tokens(events: Sequence[WorkerEvent]) -> int:
    """How many tokens are among the events.

    Raises:
        BatonError: a request failed.
    """
    for event in events:
        if isinstance(event, RequestFailed):
            raise event.error
    return sum(isinstance(event, TokenOutput) for event in events)
