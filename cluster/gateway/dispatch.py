"""An attempt at a request as its workers are sent it."""

from __future__ import annotations

import secrets
from dataclasses import replace

import numpy as np

from cluster.api import EngineRequest
from cluster.clock import now
from cluster.gateway.attempt import Attempt
from cluster.pools.replica import Replica
from cluster.routing.prefix_index import PromptPrefix
from workers.messages import WorkerRequest, shared_options
from workers.token_ids import TokenIds


def dispatch(
    attempt: Attempt,
    request: EngineRequest,
    output: TokenIds,
    prefix: PromptPrefix | None,
    timeout_s: float,
    prefill: Replica | None,
    decode: Replica | None,
) -> None:
    """Send a request to its workers, both at once.

    Args:
        attempt: which was placed on these workers.
        request: as it came.
        output: (m,), what earlier attempts have generated.
        prefix: of the prompt and this output, whose hashes go with it.
        timeout_s: what is left of its deadline.
        prefill: computes the prompt; None: the decode worker does.
        decode: decodes; None: there is nothing to decode.
    """
    prompt = request.prompt_token_ids
    common = shared_options(request) | {
        "timeout_s": timeout_s,
        "attempt_id": attempt.attempt_id,
        "handoff_id": secrets.token_bytes(16),
        "prompt_token_ids": np.concatenate((prompt, output)) if len(output) else prompt,
        "num_output_tokens": len(output),
        "traced": attempt.traced,
    }
    if len(output) and request.sampling.prompt_logprobs is not None:  # the client has them
        common["sampling"] = replace(request.sampling, prompt_logprobs=None)
    attempt.dispatched = now()
    # Prefill first: it is on the way to the first token, and what it computes before the grant comes waits for it.
    for replica, peer in ((prefill, decode), (decode, prefill)):
        if replica is not None:
            hashes = None if prefix is None else prefix.carried(replica.block_size)
            peer_engine = None if peer is None else peer.engine_id
            replica.handle.submit(WorkerRequest(**common, peer_engine=peer_engine, block_hashes=hashes))
