"""Traces of requests for OpenTelemetry: a span for each, and in it those of queue, prefill, decode.

The spans of a request are made when its answer has been sent, from what was noted meanwhile. Only
this module needs the extra `longctx[otel]`.
"""

from collections.abc import Iterator

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from api.http.account import Asked
from api.http.observing import Handled
from longctx.version import __version__


class Traces:
    """Sends the spans of each request that it is told of; `close` sends what is left."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("longctx", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def __call__(self, handled: Handled) -> None:
        """Makes the spans of a request; its parent is that of a header `traceparent`."""
        context = self._propagator.extract(dict(handled.connection.headers))
        span = self._tracer.start_span(
            f"{handled.method} {handled.route or ''}".strip(),
            context=context,
            kind=SpanKind.SERVER,
            start_time=handled.began_ns,
            attributes={
                "http.request.method": handled.method,
                "http.response.status_code": handled.status,
                **({} if handled.route is None else {"http.route": handled.route}),
                **({"longctx.tenant": handled.tenant} if handled.tenant else {}),
            },
        )
        if handled.status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        within = set_span_in_context(span)
        for asked in handled.account.asked:
            if (usage := asked.usage) is not None:
                counts = {
                    "gen_ai.usage.input_tokens": usage.prompt_tokens,
                    "gen_ai.usage.output_tokens": usage.completion_tokens,
                    "longctx.cached_tokens": usage.cached_tokens,
                    "longctx.computed_tokens": usage.computed_tokens,
                }
            else:
                counts = {}
            for name, began, ended in _phases(asked):
                phase = self._tracer.start_span(
                    name,
                    context=within,
                    start_time=handled.nanoseconds(began),
                    attributes={"longctx.request_id": asked.request_id, **counts},
                )
                phase.end(handled.nanoseconds(ended))
        span.end(handled.nanoseconds(handled.ended))

    def close(self) -> None:
        self._provider.shutdown()


def _phases(asked: Asked) -> Iterator[tuple[str, float, float]]:
    """Yields the name of each phase that a question has had, with its begin and end."""
    ended = asked.began if asked.ended is None else asked.ended
    waited = None if asked.usage is None else asked.usage.queue_seconds
    admitted = asked.began
    if waited is not None:
        # The engine's time, without that of the way to it: never beyond what follows.
        first = ended if asked.first_token is None else asked.first_token
        admitted = min(asked.began + waited, first)
        yield "queue", asked.began, admitted
    if asked.first_token is None:
        yield "prefill", admitted, ended
        return
    yield "prefill", admitted, asked.first_token
    yield "decode", asked.first_token, ended


def send_traces() -> Traces:
    """Sends traces to where OpenTelemetry's own variables say, such as OTEL_EXPORTER_OTLP_ENDPOINT,
    in a thread of its own."""
    resource = Resource.create({}) if _is_named() else Resource.create({SERVICE_NAME: "longctx"})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Traces(provider)


def _is_named() -> bool:
    return str(Resource.create({}).attributes[SERVICE_NAME]) not in ("", "unknown_service")
