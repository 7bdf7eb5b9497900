"""A traced request's time on its decode worker: the wait for its KV cache, its first tokens, the others."""

from __future__ import annotations

import time

from workers.messages import PrefillReport, SpansReport
from workers.request_trace import RequestTrace
from workers.scheduling.sequence import Sequence


def note_local_prompt(trace: RequestTrace, report: PrefillReport) -> None:
    """Its prompt was computed here, just now."""
    computed = trace.marked("received")
    started = computed - report.prefill_s
    trace.span("prefill.queue", started - report.queue_s, started)
    trace.span("prefill.compute", started, computed, chunks=report.num_chunks, cached_tokens=report.cached_tokens)


def sequence_spans(sequence: Sequence, trace: RequestTrace, stopped: str = "") -> SpansReport:
    """What is to be told when a sequence has ended.

    Args:
        sequence: whichever it is.
        trace: its own.
        stopped: why it was stopped before its last token, perhaps before its KV cache had come; empty: it was not.
    """
    now = time.time()
    received = trace.marked("received", now)
    second = trace.marked("second")
    output_tokens = len(sequence.state.output_token_ids) - sequence.request.num_output_tokens
    if sequence.request.peer_engine is not None:
        trace.span("decode.kv_wait", trace.arrived, received)
    if output_tokens > 1:
        trace.span("decode.first_token", received, second)
        trace.span("decode.generate", second, now, output_tokens=output_tokens)
    why = {"stopped": stopped} if stopped else {}
    return trace.report(sequence.request, "decode", output_tokens=output_tokens, **why)
