"""Where spans go: to a collector, by OTLP over HTTP, each with the process that it is about."""

from __future__ import annotations

from typing import Any

from workers.errors import ConfigError

_SERVICE = "baton"


class SpanTargets:
    """A tracer for the gateway, and one for each worker that spans are about.

    Args:
        exporter: takes spans; of `opentelemetry.sdk.trace.export`.
        sample: the share of traces kept that begin here; what a client's trace says of itself is followed.
        service_name: what the collector knows the service by.
    """

    def __init__(self, exporter: Any, sample: float = 1.0, service_name: str = _SERVICE) -> None:
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

        self._processor = BatchSpanProcessor(exporter)
        self._sampler = ParentBased(TraceIdRatioBased(sample))
        self._service_name = service_name
        self._tracers: dict[str, Any] = {}
        self._providers: list[Any] = []

    def tracer(self, instance: str) -> Any:
        """The one whose spans are about this instance: "gateway", or a worker's place such as "prefill-0"."""
        if instance not in self._tracers:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider

            about = {"service.name": self._service_name, "service.instance.id": instance}
            provider = TracerProvider(sampler=self._sampler, resource=Resource(about), shutdown_on_exit=False)
            provider.add_span_processor(self._processor)
            self._providers.append(provider)
            self._tracers[instance] = provider.get_tracer("baton")
        return self._tracers[instance]

    def flush(self) -> None:
        """Wait until what has ended is sent."""
        self._processor.force_flush()

    def close(self) -> None:
        """Send what is left, and stop."""
        self._processor.shutdown()


def otlp_targets(endpoint: str | None, sample: float, service_name: str) -> SpanTargets:
    """Targets that send to a collector.

    Args:
        endpoint: such as http://127.0.0.1:4318/v1/traces; None: what OTEL_EXPORTER_OTLP_ENDPOINT says, or that.
        sample: see `SpanTargets`.
        service_name: see `SpanTargets`.

    Raises:
        ConfigError: OpenTelemetry is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise ConfigError(
            "tracing.enabled is true, and OpenTelemetry is missing: pip install 'baton[trace]'"
        ) from error
    return SpanTargets(OTLPSpanExporter(endpoint=endpoint), sample, service_name)
