"""A traced prompt's time on its prefill worker: its wait, its chunks, the layers that were pushed, its handoff."""

from __future__ import annotations

import time

from kv_transfer.connector import HandoffAborted, HandoffSent
from workers.handoff.sending import Prompt
from workers.messages import SpansReport
from workers.request_trace import RequestTrace


def prompt_spans(
    prompt: Prompt, trace: RequestTrace, handoff: HandoffSent | HandoffAborted | None = None
) -> SpansReport:
    """What is to be told when nothing more will happen to a prompt here.

    Args:
        prompt: whose first token is known, unless its handoff has failed before.
        trace: its own.
        handoff: how it ended; None: there was none.
    """
    started, computed = trace.marked("started"), trace.marked("computed")
    trace.span("prefill.queue", trace.arrived, started)
    cached = prompt.progress.num_cached_tokens
    trace.span("prefill.compute", started, computed, chunks=prompt.progress.num_chunks, cached_tokens=cached)
    if isinstance(handoff, HandoffSent):
        begun = trace.marked("pushed") if handoff.num_parts else computed
        ended = computed + handoff.exposed_s if handoff.exposed_s else begun + handoff.transfer_s
        trace.span(
            "kv_transfer",
            begun,
            ended,
            bytes=handoff.num_bytes,
            writes=handoff.num_parts,
            busy_s=handoff.transfer_s,
            exposed_s=handoff.exposed_s,
        )
    elif handoff is not None:
        trace.event("handoff failed", reason=handoff.reason)
    return trace.report(prompt.request, "prefill", prompt_tokens=len(prompt.token_ids))


def stopped_prompt_spans(prompt: Prompt, trace: RequestTrace, reason: str) -> SpansReport:
    """What is to be told of a prompt that is stopped, wherever it is: its spans so far end now.

    Args:
        prompt: see `prompt_spans`.
        trace: likewise.
        reason: why it is stopped.
    """
    now = time.time()
    started = trace.marked("started", now)
    trace.span("prefill.queue", trace.arrived, started)
    if trace.has("started"):
        progress = prompt.progress
        chunks, cached = progress.num_chunks, progress.num_cached_tokens
        trace.span("prefill.compute", started, trace.marked("computed", now), chunks=chunks, cached_tokens=cached)
    if trace.has("pushed") or trace.has("computed"):
        trace.span("kv_transfer", trace.marked("pushed", trace.marked("computed", now)), now)
    return trace.report(prompt.request, "prefill", prompt_tokens=len(prompt.token_ids), stopped=reason)
