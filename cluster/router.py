"""Which pair of workers serves a request: filter by what they can do, then score by measured cost and load.

Plain data in, plain data out; knows neither Ray nor requests under way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from workers.block_manager import blocks_for
from workers.capability import Capability

_LOOK_AHEAD_TOKENS = 64
"""Decode steps that a placement is judged by: about as long as today's load is likely to last."""


@dataclass(frozen=True)
class Candidate:
    """A worker as the router sees it.

    Attributes:
        engine_id: its name.
        ready: whether it takes requests.
        max_model_len: context window, tokens.
        block_size: tokens in a KV block.
        total_blocks: of its cache.
        free_blocks: not used by requests under way, as far as the gateway knows.
        free_slots: sequences that it can still take at once.
        running: requests under way on it.
        queued_tokens: prompt tokens waiting to be computed (prefill).
        capability: measured costs.
        refusals: peers that it can never work with, and why.
        estranged: peers that it cannot reach at present, and why.
    """

    engine_id: str
    ready: bool
    max_model_len: int
    block_size: int
    total_blocks: int
    free_blocks: int
    free_slots: int
    running: int = 0
    queued_tokens: int = 0
    capability: Capability = field(default_factory=Capability)
    refusals: Mapping[str, str] = field(default_factory=dict)
    estranged: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Placement:
    """A chosen pair, and the words why.

    Attributes:
        prefill: engine id.
        decode: engine id.
        cost_s: predicted seconds to the first token and through the next tokens.
        explanation: one line a pair.
    """

    prefill: str
    decode: str
    cost_s: float
    explanation: tuple[str, ...]


@dataclass(frozen=True)
class NoPlacement:
    """No pair can take the request now.

    Attributes:
        hopeless: no pair could, even if all were idle and ready.
        reasons: one line a worker or pair.
    """

    hopeless: bool
    reasons: tuple[str, ...]


def place(
    prompt_tokens: int, max_tokens: int, prefill: Iterable[Candidate], decode: Iterable[Candidate]
) -> Placement | NoPlacement:
    """Choose the pair that is predicted to answer soonest.

    The cost of a pair is the time until the first token (the prompts queued on the prefill worker and this one) plus
    the time of the next decode steps with one sequence more in the decode worker's batch.

    Args:
        prompt_tokens: length of the prompt.
        max_tokens: the most tokens to generate.
        prefill: the prefill pool.
        decode: the decode pool.
    """
    decode = list(decode)
    reasons: list[str] = []
    hopeless = True
    best: tuple[float, int, str, str] | None = None
    explanation: list[str] = []
    for p in prefill:
        p_reason, p_hopeless = _unfit(p, prompt_tokens, needs_room=False)
        if p_reason:
            reasons.append(p_reason)
            hopeless = hopeless and p_hopeless
            continue
        for d in decode:
            reason, pair_hopeless = _unfit_pair(p, d, prompt_tokens)
            hopeless = hopeless and pair_hopeless
            if reason:
                reasons.append(reason)
                continue
            cost = _cost(p, d, prompt_tokens, max_tokens)
            explanation.append(f"{p.engine_id} -> {d.engine_id}: {cost * 1e3:.1f} ms predicted")
            best = min(best or (float("inf"), 0, "", ""), (cost, d.running + p.running, p.engine_id, d.engine_id))
    if best is None:
        return NoPlacement(hopeless and bool(reasons), tuple(dict.fromkeys(reasons)) or ("there are no workers",))
    return Placement(best[2], best[3], best[0], (*explanation, *dict.fromkeys(reasons)))


def _unfit_pair(p: Candidate, d: Candidate, prompt_tokens: int) -> tuple[str, bool]:
    for one, other in ((p, d), (d, p)):
        if other.engine_id in one.refusals:
            return f"{p.engine_id} -> {d.engine_id}: {one.refusals[other.engine_id]}", True
        if other.engine_id in one.estranged:
            return f"{p.engine_id} -> {d.engine_id}: {one.estranged[other.engine_id]}", False
    return _unfit(d, prompt_tokens, needs_room=True)


def _unfit(worker: Candidate, prompt_tokens: int, *, needs_room: bool) -> tuple[str, bool]:
    """Why a worker cannot take the prompt now (empty if it can), and whether waiting would not help."""
    needed = blocks_for(prompt_tokens + 1, worker.block_size)
    if prompt_tokens + 1 > worker.max_model_len:
        return f"{worker.engine_id}: {prompt_tokens} prompt tokens, context window {worker.max_model_len}", True
    if needed > worker.total_blocks:
        return f"{worker.engine_id}: {needed} blocks needed, {worker.total_blocks} in all", True
    if not worker.ready:
        return f"{worker.engine_id}: not ready", False
    if needs_room and worker.free_slots < 1:
        return f"{worker.engine_id}: its batch is full", False
    if needs_room and needed > worker.free_blocks:
        return f"{worker.engine_id}: {needed} blocks needed, {worker.free_blocks} free", False
    return "", False


def _cost(p: Candidate, d: Candidate, prompt_tokens: int, max_tokens: int) -> float:
    first_token = p.capability.prefill_seconds(prompt_tokens)
    if p.queued_tokens:
        first_token += p.capability.prefill_seconds(p.queued_tokens)
    return first_token + d.capability.decode_seconds(d.running + 1) * min(max_tokens, _LOOK_AHEAD_TOKENS)
