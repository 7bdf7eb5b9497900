"""What goes into a worker and what comes out of it: plain data, safe to send between processes."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from workers.sampling.params import SamplingParams


class FinishReason(enum.Enum):
    """Why a request ended well."""

    STOP = "stop"
    """An end-of-sequence token, a stop token or a stop string."""
    LENGTH = "length"
    """`max_tokens` or the end of the context window."""


@dataclass(frozen=True)
class PrefillRequest:
    """A prompt to compute, and the decode worker that its KV cache goes to.

    Attributes:
        request_id: the gateway's name for one attempt at a request, unique over time.
        handoff_id: 16 random bytes that name this handoff on both sides.
        prompt_token_ids: the prompt; never empty.
        sampling: with `seed` and `max_tokens` always set.
        decode_engine: engine id of the decode worker; None when one token is all that is wanted.
        timeout_s: seconds left of the request's deadline.
    """

    request_id: str
    handoff_id: bytes
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    decode_engine: str | None
    timeout_s: float


@dataclass(frozen=True)
class DecodeRequest:
    """A sequence to decode once its KV cache has arrived from a prefill worker. Fields as in `PrefillRequest`."""

    request_id: str
    handoff_id: bytes
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    prefill_engine: str
    timeout_s: float


@dataclass(frozen=True)
class TokenLogprob:
    """A token and its log-probability (natural logarithm, of the distribution before temperature and filters)."""

    token_id: int
    logprob: float


@dataclass(frozen=True)
class TokenOutput:
    """One generated token. `top_logprobs` is sorted, most likely first."""

    request_id: str
    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class PrefillReport:
    """How long a prompt waited on its prefill worker, and how long its first token then took to compute, in seconds."""

    request_id: str
    queue_s: float
    prefill_s: float
    num_chunks: int


@dataclass(frozen=True)
class HandoffReport:
    """What a handoff moved, measured by the prefill worker's clock.

    Attributes:
        num_bytes: KV cache bytes written.
        num_parts: WRITEs posted (layer groups × chunks).
        transfer_s: time during which at least one WRITE was in flight.
        exposed_s: time from the sampled first token to the end of the last WRITE: what prefill did not hide.
    """

    request_id: str
    num_bytes: int
    num_parts: int
    transfer_s: float
    exposed_s: float


@dataclass(frozen=True)
class DecodeReport:
    """From a handoff being complete to the first token decoded, seconds, by the decode worker's clock."""

    request_id: str
    first_decode_s: float


@dataclass(frozen=True)
class RequestFailed:
    """The request ended in an error on this worker; its blocks are already on their way back."""

    request_id: str
    error: Exception


WorkerEvent = TokenOutput | PrefillReport | HandoffReport | DecodeReport | RequestFailed


@dataclass(frozen=True)
class Load:
    """A worker's load at one moment.

    Attributes:
        total_blocks: KV blocks that the worker has.
        free_blocks: blocks that can be allocated now.
        reserved_blocks: blocks set aside for handoffs that have not completed (decode), or whose WRITEs are still
            in flight (prefill).
        quarantined_blocks: blocks that a lost peer might still write to or a stuck WRITE might still read from.
        running: sequences in the batch.
        waiting: requests waiting for blocks or for their KV cache.
        waiting_tokens: prompt tokens not yet computed (prefill) or not yet arrived (decode).
        preempted: sequences whose blocks are in host memory.
    """

    total_blocks: int
    free_blocks: int
    reserved_blocks: int = 0
    quarantined_blocks: int = 0
    running: int = 0
    waiting: int = 0
    waiting_tokens: int = 0
    preempted: int = 0


@dataclass(frozen=True)
class StepOutput:
    """Everything that one step of a worker has to say."""

    engine_id: str
    events: tuple[WorkerEvent, ...]
    load: Load
