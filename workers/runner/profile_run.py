"""The largest batches that a worker will run, run once before it has a KV cache, to see what memory they need."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from attention.kv_cache import KVCacheSpec
from workers.config import WorkerConfig
from workers.kv_cache.block_pool import blocks_for
from workers.models.causal_lm import CausalLM
from workers.runner.model_runner import ModelRunner, Row
from workers.sampling.sampler import launch_sample
from workers.sampling.state import SamplingState
from workers.sampling_params import SamplingParams
from workers.token_ids import as_token_ids

_DECODE_CONTEXT = 2048
_EVERYTHING = SamplingParams(seed=0, top_k=2, top_p=0.9, logprobs=1, presence_penalty=1.0)
"""Asks for all that choosing a token can take memory for."""


def largest_batches_of(model: CausalLM, config: WorkerConfig, max_model_len: int) -> Callable[[], None]:
    """What runs them, for `plan_kv_cache`: `max_num_batched_tokens` of prefill or `max_num_seqs` of decode, by role.

    A decode worker that computes prompts runs both, one after the other, as in its steps. All sequences share one
    block, so that the cache they run over is next to nothing. What comes out is of no use.
    """
    kinds = [prefill_rows] if config.role == "prefill" or config.local_prefill else []
    kinds += [decode_rows] if config.role == "decode" else []

    @torch.inference_mode()
    def run() -> None:
        runner = ModelRunner(model, [spec.allocate(1, model.device) for spec in model.kv_cache_groups])
        for rows in kinds:
            logits = runner.forward(rows(config, max_model_len, model.kv_cache_groups))
            states = [SamplingState(_EVERYTHING, as_token_ids((0,)), frozenset(), max_model_len=2)] * logits.shape[0]
            launch_sample(logits, states).tokens(states)

    return run


def prefill_rows(config: WorkerConfig, max_model_len: int, groups: Sequence[KVCacheSpec]) -> list[Row]:
    """As many prompts as a step may have, with as many tokens together."""
    budget = min(config.max_num_batched_tokens, config.max_num_seqs * max_model_len)
    count = min(config.max_num_seqs, budget)
    lengths = [budget // count + (i < budget % count) for i in range(count)]
    return [Row([0] * length, 0, _tables(length, groups)) for length in lengths]


def decode_rows(config: WorkerConfig, max_model_len: int, groups: Sequence[KVCacheSpec]) -> list[Row]:
    """As many sequences as a step may have, of a length that is long enough for the work to be split."""
    context = min(max_model_len, _DECODE_CONTEXT)
    return [Row((0,), context - 1, _tables(context, groups)) for _ in range(config.max_num_seqs)]


def _tables(num_tokens: int, groups: Sequence[KVCacheSpec]) -> list[list[int]]:
    """All of them in block 0."""
    return [[0] * blocks_for(num_tokens, spec.block_size) for spec in groups]
