"""Traces for OpenTelemetry: a span for each request, and in it queue, prefill and decode."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("opentelemetry.sdk", reason="the extra longctx[otel] is not installed")

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from api.http.traces import Traces
from tests.api.live_server import LiveServer
from tests.support.waiting import wait_for

PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.fixture(scope="module")
def exported() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture(scope="module")
def traced(
    model_folder: Path, tmp_path_factory: pytest.TempPathFactory, exported: InMemorySpanExporter
) -> Iterator[LiveServer]:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exported))
    traces = Traces(provider)
    store = tmp_path_factory.mktemp("store")
    with LiveServer(model_folder, store, observers=(traces,)) as running:
        yield running
    traces.close()


def spans(exported: InMemorySpanExporter, count: int) -> list[Any]:
    wait_for(lambda: len(exported.get_finished_spans()) >= count)
    found = exported.get_finished_spans()
    exported.clear()
    return list(found)


def test_a_question_has_its_phases(traced: LiveServer, exported: InMemorySpanExporter) -> None:
    body = {"prompt": "the gulls of Trieste", "max_tokens": 4, "ignore_eos": True}
    headers = {"traceparent": PARENT}
    answer = traced.http.post("/v1/completions", json=body, headers=headers).json()
    *phases, request = spans(exported, 4)
    assert request.name == "POST /v1/completions" and request.kind.name == "SERVER"
    assert format(request.context.trace_id, "032x") == PARENT.split("-")[1]
    assert format(request.parent.span_id, "016x") == PARENT.split("-")[2]
    assert request.attributes["http.response.status_code"] == 200
    assert [phase.name for phase in phases] == ["queue", "prefill", "decode"]
    moments = [request.start_time]
    for phase in phases:
        assert phase.parent.span_id == request.context.span_id
        assert phase.attributes["gen_ai.usage.input_tokens"] == answer["usage"]["prompt_tokens"]
        assert phase.attributes["gen_ai.usage.output_tokens"] == 4
        moments += [phase.start_time, phase.end_time]
    assert [*moments, request.end_time] == sorted([*moments, request.end_time])


def test_a_stream_ends_its_span_with_its_last_byte(
    traced: LiveServer, exported: InMemorySpanExporter
) -> None:
    body = {"prompt": "a", "max_tokens": 4, "ignore_eos": True, "stream": True}
    assert traced.http.post("/v1/completions", json=body).text.endswith("[DONE]\n\n")
    *phases, request = spans(exported, 4)
    assert [phase.name for phase in phases] == ["queue", "prefill", "decode"]
    assert request.end_time >= phases[-1].end_time


def test_what_asks_nothing_of_the_engine_has_no_phases(
    traced: LiveServer, exported: InMemorySpanExporter
) -> None:
    traced.http.get("/health")
    traced.http.post("/v1/completions", json={"prompt": "a", "temperature": -1})
    traced.http.get("/no/such/path")
    health, refused, none = spans(exported, 3)
    assert health.name == "GET /health" and health.parent is None
    assert refused.attributes["http.response.status_code"] == 400
    assert none.name == "GET" and "http.route" not in none.attributes


def test_a_trace_has_no_text_of_a_question(
    traced: LiveServer, exported: InMemorySpanExporter
) -> None:
    traced.http.post("/v1/completions", json={"prompt": "the secret of Trieste", "max_tokens": 2})
    told = "".join(str(dict(span.attributes)) + span.name for span in spans(exported, 4))
    assert "secret" not in told
