"""One trace a request: the gateway's own span, and below it its parts, and what both workers said of theirs."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from cluster.api import EngineRequest
from cluster.clock import now
from cluster.gateway.attempt import Attempt
from cluster.gateway.observers import EngineObserver
from cluster.trace_context import PARENT, STATE
from cluster.tracing.clocks import nanoseconds, shift_into, unix_time_offset
from cluster.tracing.exporting import SpanTargets
from workers.messages import SpansReport

_KEPT = 4096
"""Attempts that may still be reported on when their request has ended."""


@dataclass(eq=False)
class _Trace:
    """A request that is traced.

    Attributes:
        root: its span.
        context: what its children have as their parent.
        offset: from the gateway's clock to Unix time, seconds.
        waited: whether its wait at the gateway has its span.
    """

    root: Any
    context: Context
    offset: float
    waited: bool = False


class TraceRequests(EngineObserver):
    """Makes spans of what the engine tells.

    Args:
        targets: where they go.
    """

    def __init__(self, targets: SpanTargets) -> None:
        self._targets = targets
        self._gateway = targets.tracer("gateway")
        self._propagator = TraceContextTextMapPropagator()
        self._by_request: dict[EngineRequest, _Trace] = {}
        self._by_attempt: OrderedDict[str, _Trace] = OrderedDict()

    def request_arrived(self, request: EngineRequest) -> None:
        """See `EngineObserver.request_arrived`."""
        parent = self._parent(request)
        offset = unix_time_offset()
        arrived = now() + offset
        begin = request.received + offset if request.received else arrived
        attributes = {
            "baton.request_id": request.request_id,
            "gen_ai.usage.input_tokens": len(request.prompt_token_ids),
            "gen_ai.request.max_tokens": request.sampling.max_tokens or 0,
        }
        kind = trace.SpanKind.SERVER
        root = self._gateway.start_span(
            "request", parent, kind=kind, attributes=attributes, start_time=nanoseconds(begin)
        )
        if not root.is_recording():
            return
        traced = self._by_request[request] = _Trace(root, trace.set_span_in_context(root, Context()), offset)
        if begin < arrived:
            self._span(traced, "tokenize", begin, arrived)

    def _parent(self, request: EngineRequest) -> Context:
        """The caller's span, or none."""
        if not request.traceparent:
            return Context()
        headers = {PARENT: request.traceparent, STATE: request.tracestate}
        return self._propagator.extract(headers, Context())

    def request_placed(self, request: EngineRequest, attempt: Attempt) -> None:
        """See `EngineObserver.request_placed`."""
        if (traced := self._by_request.get(request)) is None:
            return
        attempt.traced = True
        self._by_attempt[attempt.attempt_id] = traced
        if len(self._by_attempt) > _KEPT:
            self._by_attempt.popitem(last=False)
        where = {"prefill": attempt.prefill, "decode": attempt.decode}
        traced.root.add_event("placed", where, timestamp=nanoseconds(now() + traced.offset))

    def first_token(self, attempt: Attempt) -> None:
        """See `EngineObserver.first_token`."""
        if (traced := self._by_attempt.get(attempt.attempt_id)) is not None and not attempt.output_before:
            traced.root.set_attribute("gen_ai.server.time_to_first_token", attempt.first_token_at - attempt.arrived)
            self._note_wait(traced, attempt)

    def spans_reported(self, attempt: Attempt, engine_id: str, report: SpansReport) -> None:
        """See `EngineObserver.spans_reported`."""
        traced = self._by_attempt.get(attempt.attempt_id)
        if traced is None or not report.spans:
            return
        whole = report.spans[0]
        # What is known of a prompt's computation is that it lies between its dispatch and its first token's arrival.
        computed = next((span for span in report.spans if span.name == "prefill.compute"), None)
        sent, came = attempt.dispatched + traced.offset, (attempt.first_token_at or now()) + traced.offset
        end, latest = (whole.end, now() + traced.offset) if computed is None else (computed.end, came)
        shift = shift_into(whole.start, end, sent, latest)
        tracer = self._targets.tracer(engine_id.partition(".")[0])
        attributes = {"baton.engine_id": engine_id, "baton.attempt_id": attempt.attempt_id, **dict(whole.attributes)}
        if shift:
            attributes["baton.clock_shift_s"] = shift
        parent = tracer.start_span(
            whole.name, traced.context, attributes=attributes, start_time=nanoseconds(whole.start + shift)
        )
        for event in report.events:
            parent.add_event(event.name, dict(event.attributes), timestamp=nanoseconds(event.at + shift))
        inside = trace.set_span_in_context(parent, Context())
        for span in report.spans[1:]:
            times = nanoseconds(span.start + shift), nanoseconds(span.end + shift)
            child = tracer.start_span(span.name, inside, attributes=dict(span.attributes), start_time=times[0])
            child.end(times[1])
        parent.end(nanoseconds(whole.end + shift))
        if computed is not None and not attempt.output_before:
            self._span(traced, "dispatch", sent, whole.start + shift)
            if attempt.first_token_at:
                self._span(traced, "first_token.return", computed.end + shift, came)

    def request_migrated(self, attempt: Attempt, error: Exception) -> None:
        """See `EngineObserver.request_migrated`."""
        if (traced := self._by_attempt.get(attempt.attempt_id)) is not None:
            traced.root.add_event("migrated", {"reason": str(error)})

    def request_finished(self, request: EngineRequest, attempt: Attempt) -> None:
        """See `EngineObserver.request_finished`."""
        output_tokens = attempt.num_tokens - len(request.prompt_token_ids)
        reason = attempt.finish_reason.value if attempt.finish_reason is not None else "stop"
        self._end(request, attempt, {"gen_ai.usage.output_tokens": output_tokens, "baton.outcome": reason})

    def request_cancelled(self, request: EngineRequest, attempt: Attempt | None) -> None:
        """See `EngineObserver.request_cancelled`."""
        self._end(request, attempt, {"baton.outcome": "abort"})

    def request_failed(self, request: EngineRequest, attempt: Attempt | None, error: Exception) -> None:
        """See `EngineObserver.request_failed`."""
        self._end(request, attempt, {"baton.outcome": "error", "error.type": type(error).__name__}, str(error))

    def _note_wait(self, traced: _Trace, attempt: Attempt) -> None:
        """The request waited at the gateway until it was sent to workers."""
        if not traced.waited:
            traced.waited = True
            self._span(traced, "queue", attempt.arrived + traced.offset, attempt.dispatched + traced.offset)

    def _span(self, traced: _Trace, name: str, start: float, end: float) -> None:
        span = self._gateway.start_span(name, traced.context, start_time=nanoseconds(start))
        span.end(nanoseconds(max(start, end)))

    def _end(
        self, request: EngineRequest, attempt: Attempt | None, attributes: dict[str, Any], error: str | None = None
    ) -> None:
        if (traced := self._by_request.pop(request, None)) is None:
            return
        if attempt is not None:
            self._note_wait(traced, attempt)
        traced.root.set_attributes(attributes)
        if error is not None:
            traced.root.set_status(trace.StatusCode.ERROR, error)
        traced.root.end(nanoseconds(now() + traced.offset))
