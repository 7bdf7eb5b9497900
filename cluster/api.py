"""The engine as the server sees it: token ids in, tokens and a report out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from cluster.caller import NOBODY, Caller
from cluster.config.group_key import group_key
from cluster.routing.types import CandidateReport
from workers.messages import Load, PromptLogprobs, RequestOptions, TokenOutput
from workers.runner.step_times import StepTimes

if TYPE_CHECKING:  # clients read these types, and have no numpy
    from cluster.routing.prefix_index import PromptPrefix
    from workers.token_ids import TokenIds


@dataclass(frozen=True, kw_only=True, eq=False)
class EngineRequest(RequestOptions):
    """A validated request.

    Attributes:
        prompt_token_ids: (n,) int32, the prompt.
        prefix: the prompt's blocks, hashed with `Engine.cache_identity` and `cache_salt` for `Engine.block_sizes`
            before the engine sees the request; None: they are hashed when workers are chosen.
        caller: who made the call.
        received: when the door had it, by the monotonic clock, before it was tokenised; 0: it is not known.
        copies: answers that its one sample is: greedy ones to one prompt are all the same.
    """

    prompt_token_ids: TokenIds
    prefix: PromptPrefix | None = field(default=None, repr=False)
    caller: Caller = NOBODY
    received: float = 0.0
    copies: int = 1


@dataclass(frozen=True)
class TokenChunk:
    """Tokens that left a worker together. The last one of each sample carries its finish reason.

    Log-probabilities of the prompt come with the first tokens, if they were asked for.
    """

    tokens: tuple[TokenOutput, ...]
    prompt_logprobs: PromptLogprobs | None = None


@dataclass(frozen=True)
class RequestReport:
    """Where a request went and where its time went. Seconds; workers are named by engine id.

    Attributes:
        prefill_worker: computed the prompt and the first token; empty when the decode worker did.
        decode_worker: the other tokens; empty when one was all that was wanted, and prefill's.
        queue_s: from arrival to the first chunk being computed (gateway queue and prefill queue together).
        prefill_s: from there to the sampled first token.
        ttft_s: from arrival to the first token reaching the gateway.
        transfer_s: time during which KV was in flight.
        exposed_transfer_s: the part of it after prefill had ended, which a client can notice.
        first_decode_s: from the complete KV cache to the first decoded token.
        kv_bytes: KV cache bytes moved.
        attempts: 1, or more when a lost prefill worker made the request start again.
        cached_tokens: of the prompt, that the worker that computed it had in its prefix cache.
        decode_cached_tokens: of the prompt, that the decode worker had in its own, and that were not moved to it.
    """

    prefill_worker: str
    decode_worker: str
    queue_s: float = 0.0
    prefill_s: float = 0.0
    ttft_s: float = 0.0
    transfer_s: float = 0.0
    exposed_transfer_s: float = 0.0
    first_decode_s: float = 0.0
    kv_bytes: int = 0
    attempts: int = 1
    cached_tokens: int = 0
    decode_cached_tokens: int = 0

    @property
    def hidden_fraction(self) -> float:
        """The share of the transfer that prefill hid, 0 to 1."""
        return 1.0 - min(1.0, self.exposed_transfer_s / self.transfer_s) if self.transfer_s > 0 else 1.0


@dataclass(frozen=True)
class WorkerStatus:
    """One worker as `baton status` shows it. `state` is starting, ready, stalled, draining or lost.

    `group` is empty in a pool that names none; `max_num_seqs` and `step_times`, what it has measured of itself, are
    there once it has loaded.
    """

    engine_id: str
    role: str
    state: str
    device: str
    attention_backend: str
    block_size: int
    load: Load
    group: str = ""
    max_num_seqs: int = 0
    step_times: StepTimes = field(default_factory=StepTimes)


@dataclass(frozen=True)
class PoolTarget:
    """How many workers a pool (`role`), or a named group of it, is to have now, at least and at most."""

    role: str
    target: int
    min_replicas: int
    max_replicas: int
    group: str = ""

    @property
    def key(self) -> str:
        """What it is scaled by."""
        return group_key(self.role, self.group)


@dataclass(frozen=True)
class Explanation:
    """Where a request would go, and why.

    Attributes:
        prompt_tokens: length of its prompt.
        max_tokens: the most that it may generate.
        pairs: those that can serve it first, best first.
    """

    prompt_tokens: int
    max_tokens: int
    pairs: tuple[CandidateReport, ...]


@dataclass(frozen=True)
class Usage:
    """Token counts of a request, of all samples; `completion_tokens` has the token that ended a text too."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class ServerInfo:
    """The program that serves: its version, the commit it was built from ("" for a release), seconds it has been up."""

    version: str
    commit: str
    uptime_s: float


@dataclass(frozen=True)
class ModelInfo:
    """The served model, as clients see it.

    Attributes:
        name: the name it is served under.
        architecture: its family, such as "llama" or "qwen3".
        dtype: what it is computed in: "float32", "bfloat16" or "float16".
        max_model_len: tokens of prompt and answer together, at most.
        vocab_size: token ids are below this.
        eos_token_ids: tokens that end a text.
        has_chat_template: whether chat messages are accepted.
    """

    name: str
    architecture: str
    dtype: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    has_chat_template: bool


class TokenStream(Protocol):
    """One request under way."""

    def __aiter__(self) -> AsyncIterator[TokenChunk]:
        """The tokens as they come; ends after the chunk with the finish reason.

        Raises:
            BatonError: a subclass of `workers.errors` or `cluster.errors`, which each door answers in its own way.
        """
        ...

    async def report(self) -> RequestReport:
        """Where the request went and where its time went, as far as it is known."""
        ...

    def complete(self) -> None:
        """The tokens so far are all that is wanted, a stop string was found: the request has finished well."""
        ...

    def drop(self, index: int) -> None:
        """Nobody wants the rest of this sample; the others go on. The last one is ended by `aclose` alone."""
        ...

    async def aclose(self) -> None:
        """Cancel what is still under way, on both sides."""
        ...


@runtime_checkable
class PolledStream(Protocol):
    """A `TokenStream` whose tokens may be taken while its iterator waits for them: no task is woken for each.

    What is more than tokens, the last one, log-probabilities of the prompt, errors and other workers, is the
    iterator's alone, so that somebody must wait for its next chunk all the time.
    """

    def listen(self, reader: Callable[[], None]) -> None:
        """Call this when there are tokens to `poll`."""
        ...

    def poll(self) -> tuple[TokenOutput, ...]:
        """Tokens that the iterator would return; none where there are none, or they are for the iterator."""
        ...

    def wake(self) -> None:
        """Have the iterator return, if need be without tokens."""
        ...

    def fail(self, error: Exception) -> None:
        """Have the iterator raise this: whoever reads cannot go on."""
        ...


class Engine(Protocol):
    """What the server needs of the cluster."""

    def generate(self, request: EngineRequest) -> TokenStream:
        """Run one request."""
        ...

    @property
    def block_sizes(self) -> frozenset[int]:
        """Tokens in a block of the workers' prefix caches: all sizes that there are."""
        ...

    @property
    def cache_identity(self) -> bytes:
        """The digest of the model whose keys and values the workers keep: what all salts of their blocks begin with."""
        ...

    def workers(self) -> list[WorkerStatus]:
        """Every worker, prefill first."""
        ...

    def explain(self, request: EngineRequest) -> list[CandidateReport]:
        """Where a request would go if it came now: every pair of workers, best first. Nothing is reserved."""
        ...

    def scale(self, targets: Mapping[str, int]) -> list[PoolTarget]:
        """Have pools grow or shrink to so many workers, by role, or by role and group where a pool has named groups.

        The others stay as they are. Returns all targets.

        Raises:
            InvalidRequestError: there is no such pool or group, or it may not have so many workers.
        """
        ...
