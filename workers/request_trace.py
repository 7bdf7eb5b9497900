"""When things happened to a request on a worker, for those requests that are traced."""

from __future__ import annotations

import time

from workers.messages import SpanEvent, SpansReport, WorkerRequest, WorkerSpan

_MOST_EVENTS = 512


class RequestTrace:
    """Notes times, as Unix time in seconds: they are to be seen beside those of other machines.

    Attributes:
        arrived: when the request came.
    """

    def __init__(self) -> None:
        self.arrived = time.time()
        self._marks: dict[str, float] = {}
        self._open: list[tuple[float, dict[str, int | float | str]]] = []
        self._spans: list[WorkerSpan] = []
        self._events: list[SpanEvent] = []

    @classmethod
    def of(cls, request: WorkerRequest) -> RequestTrace | None:
        """One for a request that has just come; None: it is not traced."""
        return cls() if request.traced else None

    def mark(self, name: str) -> None:
        """Something has happened now; the first time counts."""
        self._marks.setdefault(name, time.time())

    def marked(self, name: str, otherwise: float | None = None) -> float:
        """When that was; if it has not happened, the other time, or else the arrival."""
        return self._marks.get(name, self.arrived if otherwise is None else otherwise)

    def has(self, name: str) -> bool:
        """Whether that has happened."""
        return name in self._marks

    def event(self, name: str, **attributes: int | float | str) -> None:
        """Something has happened now that takes no time; of very many the first are kept."""
        if len(self._events) < _MOST_EVENTS:
            self._events.append(SpanEvent(name, time.time(), tuple(attributes.items())))

    def begin_step(self, **attributes: int | float | str) -> None:
        """A step that computes some of it is launched; steps end in order."""
        self.mark("started")
        self._open.append((time.time(), attributes))

    def end_step(self, name: str) -> None:
        """The oldest step that is launched has landed."""
        if self._open:
            start, attributes = self._open.pop(0)
            self.span(name, start, time.time(), **attributes)

    def span(self, name: str, start: float, end: float, **attributes: int | float | str) -> None:
        """Something took from then to then."""
        self._spans.append(WorkerSpan(name, start, max(start, end), tuple(attributes.items())))

    def report(self, request: WorkerRequest, name: str, **attributes: int | float | str) -> SpansReport:
        """All of it, inside one span of this name from the arrival until now."""
        whole = WorkerSpan(name, self.arrived, time.time(), tuple(attributes.items()))
        spans = (whole, *self._spans)
        return SpansReport(request.request_id, spans, tuple(self._events), attempt_id=request.attempt_id)
