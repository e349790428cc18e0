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

from api.engine_metrics import ENGINE_METRICS, SHARED_LABELS
from api.files.document import DocumentState
from api.files.document_library import DocumentLibrary
from api.http.account import Asked
from longctx.engine_stats import EngineStats
from longctx.errors import LongctxError
from longctx.process.client import EngineClient, State
from longctx.version import __version__

METHODS = frozenset(HTTPMethod)  # clients may invent others, and each would be a label for ever
STATS_SECONDS = 5.0  # a step that takes longer is not waited for: Prometheus would give up
TOKENS = tuple(float(1 << bits) for bits in range(21))
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 5, 20)
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)


class HTTPMetrics:
    """Holds what is counted as requests are answered, from the start of the server on."""

    def __init__(self, *, prefix: str = "longctx", model: str = "") -> None:
        """`prefix` begins the names of the metrics that vLLM has too, which are labelled with the
        `model`."""
        self.prefix = prefix
        self.model = model
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
        self.first_token_seconds = self._histogram(
            "time_to_first_token_seconds", "From the engine's request to its first token", SECONDS
        )
        self.next_token_seconds = self._histogram(
            "inter_token_latency_seconds",
            "From a token of an answer to the next one",
            TOKEN_SECONDS,
        )
        self._next_token = self.next_token_seconds.labels(model)  # each token is noted
        self.request_seconds = self._histogram(
            "e2e_request_latency_seconds", "From the engine's request to its end", SECONDS
        )
        self.queue_seconds = self._histogram(
            "request_queue_time_seconds", "Until a request is first computed", SECONDS
        )
        self.prefill_seconds = self._histogram(
            "request_prefill_time_seconds", "From then to its first token", SECONDS
        )
        self.decode_seconds = self._histogram(
            "request_decode_time_seconds", "From its first token to its last", SECONDS
        )
        self.prompt_tokens = self._histogram(
            "request_prompt_tokens", "Tokens of the prompt of a request", TOKENS
        )
        self.answer_tokens = self._histogram(
            "request_generation_tokens", "Tokens of the answers of a request", TOKENS
        )
        self.successes = Counter(
            f"{prefix}:request_success",
            "Questions that the engine has ended, by how they did",
            (*SHARED_LABELS, "finished_reason"),
            registry=None,
        )

    def collectors(self) -> "list[Counter | Histogram]":
        """Returns all of them, for a registry."""
        return [
            self.requests,
            self.seconds,
            self.first_token_seconds,
            self.next_token_seconds,
            self.request_seconds,
            self.queue_seconds,
            self.prefill_seconds,
            self.decode_seconds,
            self.prompt_tokens,
            self.answer_tokens,
            self.successes,
        ]

    def tokens(self, seconds: float, is_first: bool, *, count: int) -> None:
        """Notes how long so many tokens of an answer, which came together, were waited for."""
        if is_first:
            self.first_token_seconds.labels(self.model).observe(seconds)
        else:
            for _ in range(count):
                self._next_token.observe(seconds / count)

    def answered(self, question: Asked) -> None:
        """Notes a question to the engine that has ended."""
        self.successes.labels(self.model, question.finish_reason.value).inc()
        if question.ended is not None:
            self.request_seconds.labels(self.model).observe(question.ended - question.began)
        usage = question.usage
        if usage is None:
            return
        self.prompt_tokens.labels(self.model).observe(usage.prompt_tokens)
        self.answer_tokens.labels(self.model).observe(usage.completion_tokens)
        if usage.queue_seconds is None:
            return
        self.queue_seconds.labels(self.model).observe(usage.queue_seconds)
        if question.first_token is not None and question.last_token is not None:
            prefill = question.first_token - question.began - usage.queue_seconds
            self.prefill_seconds.labels(self.model).observe(max(0.0, prefill))
            decode = question.last_token - question.first_token
            self.decode_seconds.labels(self.model).observe(decode)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(
            f"{self.prefix}:{name}", text, SHARED_LABELS, buckets=buckets, registry=None
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
        for metric in self.http.collectors():
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
            prefix=self.http.prefix,
            model=self.http.model,
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
    prefix: str = "longctx"
    model: str = ""

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
                family = metric.family(self.stats, prefix=self.prefix, model=self.model)
                if family.samples:  # an engine without a disk says nothing of disks
                    yield family
            yield from self.derived(self.stats)

    def derived(self, stats: EngineStats) -> Iterator[Metric]:
        """Yields what vLLM tells in another way than we do."""
        fills = [group.blocks_in_use / max(1, group.capacity_blocks) for group in stats.groups]
        usage = GaugeMetricFamily(
            f"{self.prefix}:kv_cache_usage_perc",
            "Part of the device's KV blocks in use, of the fullest layer group; 1 is all",
            labels=SHARED_LABELS,
        )
        usage.add_metric((self.model,), max(fills))
        yield usage
        queries = CounterMetricFamily(
            f"{self.prefix}:prefix_cache_queries",
            "Prompt tokens of ended requests that were looked for in the cache",
            labels=SHARED_LABELS,
        )
        queries.add_metric((self.model,), stats.prompt_tokens)
        yield queries


def _gauge(name: str, text: str, samples: list[tuple[Mapping[str, str], float]]) -> Metric:
    family = GaugeMetricFamily(name, text)
    for labels, value in samples:
        family.add_sample(name, dict(labels), value)
    return family
