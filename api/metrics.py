"""`GET /metrics`: what the server and its engine count, for Prometheus.

`engine_metrics.py` names what the engine tells. A scrape while the engine restarts has the rest.
All numbers are of all tenants together, so like every route but `/health` this one wants an API key
where there are keys: Prometheus sends it with `authorization: {credentials: KEY}`.
"""

import asyncio
import collections
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPMethod
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.engine_metrics import ENGINE_METRICS
from api.files.document import DocumentState
from api.files.document_library import DocumentLibrary
from longctx.engine_stats import EngineStats
from longctx.errors import LongctxError
from longctx.process.client import EngineClient, State
from longctx.version import __version__

METHODS = frozenset(HTTPMethod)  # clients may invent others, and each would be a label for ever
STATS_SECONDS = 5.0  # a step that takes longer is not waited for: Prometheus would give up
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)


class HTTPMetrics:
    """Holds what is counted as requests are answered, from the start of the server on."""

    def __init__(self) -> None:
        self.requests = Counter(
            "longctx_http_requests",
            "HTTP requests answered",
            ("route", "method", "status"),
            registry=None,
        )
        self.seconds = Histogram(
            "longctx_http_request_seconds",
            "From the request to the last byte of its answer",
            ("route", "status"),
            buckets=SECONDS,
            registry=None,
        )
        self.first_token_seconds = Histogram(
            "longctx_time_to_first_token_seconds",
            "From the engine's request to its first token",
            buckets=SECONDS,
            registry=None,
        )


class MetricsMiddleware:
    """ASGI middleware: counts and times every request by its route and status."""

    def __init__(self, app: ASGIApp, *, metrics: HTTPMetrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status = 500  # where nothing is sent: an exception that nobody expected

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        began = time.perf_counter()
        try:
            await self.app(scope, receive, watch)
        finally:
            # The router leaves the route; without one the path is anybody's, and no label.
            route = getattr(scope.get("route"), "path", "none")
            method = scope["method"] if scope["method"] in METHODS else "other"
            self.metrics.requests.labels(route, method, str(status)).inc()
            self.metrics.seconds.labels(route, str(status)).observe(time.perf_counter() - began)


class MetricsRoute:
    """Answers a scrape. It asks the engine, which answers between two of its steps."""

    def __init__(self, engine: EngineClient, library: DocumentLibrary, http: HTTPMetrics) -> None:
        self.engine = engine
        self.library = library
        self.http = http

    async def scrape(self, request: Request) -> Response:
        """Returns all metrics, in the Prometheus text format or in OpenMetrics."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(await self._snapshot())
        for metric in (self.http.requests, self.http.seconds, self.http.first_token_seconds):
            registry.register(metric)
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), headers={"content-type": content_type})

    async def _snapshot(self) -> "Snapshot":
        stats: EngineStats | None = None
        with suppress(LongctxError, TimeoutError):  # it restarts, or a step takes very long
            stats = await asyncio.wait_for(self.engine.stats(), STATS_SECONDS)
        documents = collections.Counter(
            self.library.state(document) for document in self.library.documents()
        )
        info = self.engine.info
        labels = {
            "version": __version__,
            "model": info.model_name,
            "kv_codec": info.kv_codec,
            "device": info.device,
            "dtype": info.dtype,
            "attention_backend": info.backend,
        }
        return Snapshot(
            stats=stats,
            engine_state=self.engine.state,
            engine_restarts=self.engine.restarts,
            ranks=self.engine.config.ring.ranks,
            documents=documents,
            info=labels,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)  # a registry wants it hashable
class Snapshot:
    """Collects all metrics but those of HTTP, as of one moment, for a registry."""

    stats: EngineStats | None  # None while the engine restarts
    engine_state: State
    engine_restarts: int
    ranks: int
    documents: Mapping[DocumentState, int]
    info: Mapping[str, str]

    def collect(self) -> Iterator[Metric]:
        yield _gauge("longctx_info", "What is served; always 1", [(self.info, 1.0)])
        states: tuple[State, ...] = get_args(State)
        yield _gauge(
            "longctx_engine_state",
            "1 for the state that the engine process is in",
            [({"state": state}, float(state == self.engine_state)) for state in states],
        )
        kinds: tuple[DocumentState, ...] = get_args(DocumentState)
        yield _gauge(
            "longctx_documents",
            "Documents of all tenants",
            [({"state": state}, float(self.documents.get(state, 0))) for state in kinds],
        )
        yield GaugeMetricFamily(
            "longctx_ranks", "Processes that share each prompt", value=self.ranks
        )
        yield CounterMetricFamily(
            "longctx_engine_restarts",
            "Times that the engine ended and was restarted",
            value=self.engine_restarts,
        )
        if self.stats is not None:
            for metric in ENGINE_METRICS:
                family = metric.family(self.stats)
                if family.samples:  # an engine without a disk says nothing of disks
                    yield family


def _gauge(name: str, text: str, samples: list[tuple[Mapping[str, str], float]]) -> Metric:
    family = GaugeMetricFamily(name, text)
    for labels, value in samples:
        family.add_sample(name, dict(labels), value)
    return family
