"""Requests as tests make them: what is not said is the simplest that works."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.api import EngineRequest
from workers.messages import WorkerRequest
from workers.sampling_params import SamplingParams
from workers.token_ids import as_token_ids

GREEDY = SamplingParams(temperature=0.0, seed=0)


def worker_request(
    name: str,
    prompt: Sequence[int],
    sampling: SamplingParams = GREEDY,
    peer: str | None = None,
    *,
    handoff_id: bytes | None = None,
    timeout_s: float = 60.0,
    **others: object,
) -> WorkerRequest:
    """A request for one worker; its attempt and its handoff have its name, too."""
    made = {
        "request_id": name,
        "attempt_id": name,
        "handoff_id": name.encode().ljust(16, b".")[:16] if handoff_id is None else handoff_id,
        "prompt_token_ids": as_token_ids(prompt),
        "sampling": sampling,
        "peer_engine": peer,
        "timeout_s": timeout_s,
    }
    return WorkerRequest(**{**made, **others})


def engine_request(
    name: str, prompt: Sequence[int], sampling: SamplingParams = GREEDY, timeout_s: float = 60.0, **others: object
) -> EngineRequest:
    """A request as a door gives it to the engine."""
    made = {"request_id": name, "prompt_token_ids": as_token_ids(prompt), "sampling": sampling, "timeout_s": timeout_s}
    return EngineRequest(**{**made, **others})
