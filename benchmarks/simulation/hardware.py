"""What a simulated worker is made of, and how long things take on it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kv_transfer.layout import GroupLayout, KVLayout
from kv_transfer.region import Region
from kv_transfer.transports.base import EngineInfo
from workers.runner.step_times import StepTimes
from workers.worker_host import WorkerInfo


@dataclass(frozen=True)
class Hardware:
    """What a simulated worker is made of.

    Attributes:
        step_times: how long things take.
        num_blocks: of its KV cache.
        block_size: tokens in a block.
        max_num_seqs: sequences at once.
        chunk_tokens: of prompts, that a decode worker computes beside a step.
        kv_bytes_per_token: what a handoff moves.
        num_layers: in which it moves it.
        link_bytes_per_s: how fast, at most.
        host: where it is; empty: nobody knows.
        network_bytes_per_s: how fast KV cache moves to other hosts, at most.
        host_bytes_per_s: how fast a sequence's blocks move to host memory or back; the batch waits for it.
        load_s: from start to ready.
        steps_at_once: decode steps that are reckoned together.
    """

    step_times: StepTimes
    num_blocks: int = 8192
    block_size: int = 64
    max_num_seqs: int = 256
    chunk_tokens: int = 2048
    kv_bytes_per_token: int = 131_072
    num_layers: int = 32
    link_bytes_per_s: float = 250e9
    host: str = ""
    network_bytes_per_s: float = math.inf
    host_bytes_per_s: float = 50e9
    load_s: float = 20.0
    steps_at_once: int = 4

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer: what fits the cache."""
        return min(131_072, self.num_blocks * self.block_size)

    def prompt_s(self, num_tokens: int, cached_tokens: int) -> float:
        """A prompt of which so much is cached; as the router reckons it, see `WorkerTable.missing_seconds`."""
        whole = self.step_times.prefill_seconds(num_tokens)
        if not cached_tokens:
            return whole
        rest = self.step_times.prefill_seconds(num_tokens - cached_tokens)
        return max(whole - self.step_times.prefill_seconds(cached_tokens), rest)

    def bytes_per_s(self, peer: Hardware) -> float:
        """How fast KV cache moves between the two."""
        link = min(self.link_bytes_per_s, peer.link_bytes_per_s)
        return link if self.host == peer.host else min(link, self.network_bytes_per_s, peer.network_bytes_per_s)

    def exposed_s(self, peer: Hardware, num_tokens: int, compute_s: float) -> float:
        """What is left of moving so much of a prompt when it is computed: the last layer, and what did not get away."""
        moving_s = num_tokens * self.kv_bytes_per_token / self.bytes_per_s(peer)
        return max(moving_s / self.num_layers, moving_s - compute_s)

    def described(self, name: str, role: str, engine_id: str) -> WorkerInfo:
        """What a worker made of it says of itself."""
        layout = KVLayout((GroupLayout("full", tuple(range(self.num_layers)), self.block_size, 8, 128, "bfloat16"),))
        region = Region(0, self.num_layers, self.num_blocks, layout.primary.block_bytes)
        return WorkerInfo(
            name=name,
            role=role,
            engines=(EngineInfo(engine_id, 0, layout, (region,), "cuda", 0, b""),),
            device="simulated",
            attention_backend="NONE",
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            num_blocks=self.num_blocks,
            step_times=self.step_times,
            pid=0,
            max_num_batched_tokens=self.chunk_tokens,
        )
