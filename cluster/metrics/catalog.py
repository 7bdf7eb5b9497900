"""Every metric, as data: what it is called, what it counts, by which labels, and vLLM's name where that is the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]

_MODEL = ("model_name",)
_SERVICE = ("model_name", "engine")
_WORKER = ("model_name", "engine", "role")
_PAIR = ("model_name", "prefill", "decode")

_FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
_TOKEN_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_REQUEST_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
_SHORT_S = (
    0.00001, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
    30.0,
)  # fmt: skip
_TOKENS: Literal["tokens"] = "tokens"
"""Stands for 1, 2, 5, 10, … up to the context window, as vLLM has it."""


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: without its prefix, and of a counter without `_total`.
        kind: counter, gauge or histogram.
        help: what it is, with its unit.
        labels: in order.
        buckets: upper bounds of a histogram; "tokens" for those of token counts.
        vllm: whether vLLM has a metric of this name and meaning, so that it may be published under vLLM's prefix.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = _MODEL
    buckets: tuple[float, ...] | Literal["tokens"] = ()
    vllm: bool = False

    @property
    def published_name(self) -> str:
        """As queries have it, without the prefix; of a histogram without `_bucket`, `_sum` and `_count`."""
        return f"{self.name}_total" if self.kind == "counter" else self.name


def _counter(name: str, text: str, *labels: str, of: tuple[str, ...] = _MODEL, vllm: bool = False) -> Metric:
    return Metric(name, "counter", text, (*of, *labels), vllm=vllm)


def _gauge(name: str, text: str, *labels: str, of: tuple[str, ...] = _MODEL, vllm: bool = False) -> Metric:
    return Metric(name, "gauge", text, (*of, *labels), vllm=vllm)


def _histogram(
    name: str,
    text: str,
    buckets: tuple[float, ...] | Literal["tokens"],
    of: tuple[str, ...] = _MODEL,
    vllm: bool = False,
) -> Metric:
    return Metric(name, "histogram", text, of, buckets, vllm)


AS_IN_VLLM = (
    _gauge("num_requests_running", "Requests in a worker's batch.", of=_WORKER, vllm=True),
    _gauge(
        "num_requests_waiting",
        "Requests that wait on a worker for blocks or for their KV cache, or (engine 0) at the gateway for workers.",
        of=_WORKER,
        vllm=True,
    ),
    _gauge("kv_cache_usage_perc", "Share of a worker's KV blocks in use; 1 is all of them.", of=_WORKER, vllm=True),
    _counter("prefix_cache_queries", "Prompt tokens that prefix caches were asked for.", of=_SERVICE, vllm=True),
    _counter("prefix_cache_hits", "Prompt tokens that prefix caches had.", of=_SERVICE, vllm=True),
    _counter("num_preemptions", "Sequences whose blocks went to host memory to make room.", of=_SERVICE, vllm=True),
    _counter("prompt_tokens", "Prompt tokens of requests that had a first token.", of=_SERVICE, vllm=True),
    _counter("prompt_tokens_cached", "Of these, those found in a prefix cache.", of=_SERVICE, vllm=True),
    _counter("generation_tokens", "Tokens generated.", of=_SERVICE, vllm=True),
    _counter(
        "request_success",
        "Requests that have ended, by why: stop, length, abort (the client left) or error.",
        "finished_reason",
        of=_SERVICE,
        vllm=True,
    ),
    _histogram("request_prompt_tokens", "Prompt tokens of a request.", _TOKENS, _SERVICE, vllm=True),
    _histogram("request_generation_tokens", "Tokens generated for a request.", _TOKENS, _SERVICE, vllm=True),
    _histogram("request_params_max_tokens", "Tokens that a request may generate.", _TOKENS, _SERVICE, vllm=True),
    _histogram(
        "time_to_first_token_seconds",
        "From a request's arrival to its first token at the gateway.",
        _FIRST_TOKEN_S,
        _SERVICE,
        vllm=True,
    ),
    _histogram("inter_token_latency_seconds", "From one token to the next.", _TOKEN_S, _SERVICE, vllm=True),
    _histogram(
        "request_time_per_output_token_seconds",
        "Mean time between a request's tokens.",
        _TOKEN_S,
        _SERVICE,
        vllm=True,
    ),
    _histogram("e2e_request_latency_seconds", "From arrival to the last token.", _REQUEST_S, _SERVICE, vllm=True),
    _histogram(
        "request_queue_time_seconds",
        "From arrival to the first chunk of the prompt being computed, at the gateway and on the worker.",
        _REQUEST_S,
        _SERVICE,
        vllm=True,
    ),
    _histogram(
        "request_prefill_time_seconds", "From there to the sampled first token.", _REQUEST_S, _SERVICE, vllm=True
    ),
    _histogram("request_decode_time_seconds", "From the first token to the last one.", _REQUEST_S, _SERVICE, vllm=True),
    _histogram(
        "request_inference_time_seconds",
        "From the first chunk being computed to the last token.",
        _REQUEST_S,
        _SERVICE,
        vllm=True,
    ),
)

OF_REQUESTS = (
    _counter("requests_refused", "Requests that were not let in, by the error's type.", "error"),
    _counter("request_failures", "Requests that ended in an error, by its type.", "error"),
    _counter("migrations", "Requests that went on elsewhere, by why: see handoffs.", "reason"),
    _counter("attempts", "Attempts at requests, by how they ended: finished, cancelled, failed, migrated.", "outcome"),
    _gauge("attempts_running", "Attempts under way on workers."),
    _histogram("request_attempts", "Attempts that a finished request took.", (1, 2, 3, 5, 10)),
    _histogram("gateway_queue_seconds", "From a request's arrival to its being sent to workers.", _SHORT_S),
    _histogram("prefill_queue_seconds", "A prompt's wait on the worker that computes it.", _SHORT_S),
    _histogram("prefill_seconds", "From a prompt's first chunk to its sampled first token.", _SHORT_S),
    _histogram("prefill_chunks", "Steps that a prompt was computed in.", (1, 2, 4, 8, 16, 32, 64, 128)),
    _histogram("first_decode_seconds", "From the whole KV cache to the first decoded token.", _SHORT_S),
    _counter("local_prefills", "Prompts computed on the worker that decodes them."),
)

OF_HANDOFFS = (
    _counter(
        "handoffs",
        "Handoffs by outcome (completed, failed, cancelled) and reason (docs/metrics.md lists them).",
        "outcome",
        "reason",
    ),
    _histogram("kv_transfer_seconds", "Time in which a WRITE of a handoff was in flight.", _SHORT_S),
    _histogram("kv_transfer_exposed_seconds", "The part of it after prefill had ended: not hidden.", _SHORT_S),
    _histogram(
        "kv_transfer_hidden_ratio",
        "The share of a handoff's transfer that prefill hid, 0 to 1.",
        (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0),
    ),
    _counter("kv_transfer_bytes", "Bytes of KV cache moved, by pair.", of=_PAIR),
    _counter("kv_transfer_busy_seconds", "Seconds in which WRITEs of a pair's handoffs were in flight.", of=_PAIR),
    _counter("kv_transfer_writes", "WRITEs posted (groups of layers × chunks), by pair.", of=_PAIR),
    _counter("decode_cached_tokens", "Prompt tokens that decode workers had already, and that were not moved."),
    _gauge("link_bandwidth_bytes_per_second", "Of a pair's link, as measured when the two met.", of=_PAIR),
    _gauge("link_write_seconds", "What posting one WRITE on a pair's link costs.", of=_PAIR),
)

OF_ROUTING = (
    _counter(
        "router_decisions",
        "Placements: pair, decode_alone or none; by reason: prefix_cache, predicted_time, no_room, impossible.",
        "decision",
        "reason",
    ),
    _histogram("router_decision_seconds", "What choosing workers took.", _SHORT_S),
)

OF_WORKERS = (
    _gauge("workers", "Workers of a pool or group, by state.", "role", "group", "state"),
    _gauge("workers_target", "Workers that a pool or group is to have.", "role", "group"),
    _counter("worker_losses", "Workers that were lost.", "role"),
    _gauge("kv_blocks", "KV blocks that a worker has.", of=_WORKER),
    _gauge("kv_blocks_free", "Blocks that can be allocated now.", of=_WORKER),
    _gauge("kv_blocks_granted", "Decode: blocks granted to handoffs that are not complete.", of=_WORKER),
    _gauge("kv_blocks_pinned", "Prefill: blocks of computed prompts whose WRITEs are in flight.", of=_WORKER),
    _gauge("kv_blocks_quarantined", "Blocks that a lost peer might still write to or read from.", of=_WORKER),
    _gauge("waiting_prompt_tokens", "Prompt tokens not computed yet, or neither arrived nor computed.", of=_WORKER),
    _gauge("sequences_swapped", "Sequences whose blocks are in host memory.", of=_WORKER),
    _counter("worker_heartbeats", "Times that a worker was heard, since it started.", of=_WORKER),
    _gauge("worker_silence_seconds", "Since a worker was last heard.", of=_WORKER),
)

OF_GATEWAY = (
    _histogram("event_loop_lag_seconds", "How late a timer of the gateway's event loop is.", _SHORT_S),
    _counter("gateway_cpu_seconds", "Processor time of the gateway's process."),
)

CATALOG = (*AS_IN_VLLM, *OF_REQUESTS, *OF_HANDOFFS, *OF_ROUTING, *OF_WORKERS, *OF_GATEWAY)


def token_buckets(most: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50 … up to `most`, tokens."""
    bounds: list[float] = []
    power = 1
    while True:
        for digit in (1, 2, 5):
            if digit * power > most:
                return tuple(bounds) or (1.0,)
            bounds.append(float(digit * power))
        power *= 10
