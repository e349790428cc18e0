"""`GET /metrics`: what the server and its engine count, for Prometheus.

The engine tells its figures by flat names, between two steps; here they get metric names, units,
help and labels. A scrape while the engine restarts has the rest. Figures are of all tenants
together, so like every route but `/health` this one wants an API key where there are keys:
Prometheus sends it with `authorization: {credentials: KEY}`.
"""

import asyncio
import re
import time
from collections import Counter as Count
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.files.document import DocumentState
from api.files.document_library import DocumentLibrary
from longctx.errors import LongctxError
from longctx.process.client import EngineClient, State
from longctx.version import __version__

STATS_SECONDS = 5.0  # a step that takes longer is not waited for: Prometheus would give up
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)

# Figure of the engine -> metric, without `longctx_`, and help.
PLAIN = {
    "requests_running": ("requests_running", "Answers and prompts in the current batch"),
    "requests_waiting": ("requests_waiting", "Prompts that wait for room or for others"),
    "steps_total": ("steps_total", "Batches computed"),
    "computed_tokens_total": ("computed_tokens_total", "Tokens that the model really computed"),
    "prompt_tokens_total": ("prompt_tokens_total", "Tokens in the prompts of ended requests"),
    "cached_tokens_total": ("cached_tokens_total", "Of these, tokens found in a cache"),
    "generated_tokens_total": ("generated_tokens_total", "Tokens in the answers of ended requests"),
    "preemptions_total": ("preemptions_total", "Sequences that gave way for want of memory"),
    "documents_open": ("documents_open", "Documents that the engine knows"),
    "modules_open": ("modules_open", "Modules of schemas and kept prompts that the engine knows"),
    "prefixes_held": ("prefixes_held", "Documents, each after its prompt, whole on the device"),
    "raw_blocks_held": ("raw_blocks_in_use", "Blocks that are being filled"),
    "ranks": ("ranks", "Processes that share each prompt"),
    "engine_restarts_total": ("engine_restarts_total", "Times that the engine was lost"),
    "ring_sent_bytes_total": ("ring_sent_bytes_total", "Bytes that ranks sent to each other"),
    "ring_wait_seconds_total": ("ring_wait_seconds_total", "Time rank 0 waited for other ranks"),
    "ring_link_latency_seconds": ("ring_link_latency_seconds", "Between ranks, as measured"),
    "ring_link_bytes_per_second": ("ring_link_bytes_per_second", "Between ranks, as measured"),
    "store_queue_bytes": ("kv_write_queue_bytes", "On their way to host memory and disk"),
    "store_loads": ("kv_loads_running", "Prompts that are read from host memory or disk"),
    "store_loads_late_total": ("kv_loads_late_total", "Reads that were given up for their time"),
    "store_failures_total": ("kv_transfer_failures_total", "Transfers that failed by a bug"),
    "store_read_bytes_per_second": ("kv_disk_read_bytes_per_second", "As measured lately"),
}
# The same for what each tier tells; the label is the tier.
OF_TIER = {
    "bytes": ("kv_bytes", "Bytes of KV blocks held"),
    "capacity_bytes": ("kv_capacity_bytes", "Bytes of KV blocks that may be held"),
    "blocks": ("kv_blocks", "KV blocks held, counted once for each layer group"),
    "blocks_held": ("kv_blocks_in_use", "Blocks that may not be evicted now"),
    "extents": ("kv_extents", "Files of KV blocks"),
    "hits_total": ("kv_hits_total", "Blocks that were looked for and found"),
    "misses_total": ("kv_misses_total", "Blocks that were looked for and not found"),
    "writes_total": ("kv_writes_total", "Files written"),
    "read_seconds_total": ("kv_read_seconds_total", "Time spent reading blocks"),
    "read_bytes_total": ("kv_read_bytes_total", "Bytes of blocks read"),
    "write_seconds_total": ("kv_write_seconds_total", "Time spent writing blocks"),
    "write_bytes_total": ("kv_write_bytes_total", "Bytes of blocks written"),
    "corrupt_files_total": ("kv_checksum_failures_total", "Damaged files, put in quarantine"),
    "quarantine_bytes": ("kv_quarantine_bytes", "Bytes of damaged files, kept to look at"),
    "quarantine_files": ("kv_quarantine_files", "Damaged files, kept to look at"),
    "writes_off": ("kv_writes_off", "1 while nothing is written after a failure"),
}
# Figure, metric, help, and the label that its name carries.
PATTERNS = (
    (r"requests_(stop|length|abort|error)_total", "requests_total", "Requests ended", "reason"),
    (r"group(\d+)_blocks_held", "kv_group_blocks_in_use", "Blocks of a layer group", "group"),
    (r"group(\d+)_capacity_blocks", "kv_group_capacity_blocks", "Blocks that fit", "group"),
)
TIER = re.compile(r"(device|host|disk)_(.+)")
EVICTIONS = re.compile(r"evictions_(.+)_total")
INCIDENT = re.compile(r"(.+)_total")


@dataclass(frozen=True, slots=True)
class Sample:
    metric: str  # without `longctx_`; counters end in `_total`
    help: str
    labels: Mapping[str, str]


def sample_of(figure: str) -> Sample:
    """The metric and labels of a figure that the engine tells by this name."""
    if figure in PLAIN:
        return Sample(*PLAIN[figure], {})
    for pattern, metric, text, label in PATTERNS:
        if found := re.fullmatch(pattern, figure):
            return Sample(metric, text, {label: found[1]})
    if not (found := TIER.fullmatch(figure)):
        return Sample(figure, "A figure of the engine", {})
    tier, rest = found.groups()
    if rest in OF_TIER:
        return Sample(*OF_TIER[rest], {"tier": tier})
    if found := EVICTIONS.fullmatch(rest):
        return Sample(
            "kv_evictions_total", "Blocks or files that left", {"tier": tier, "reason": found[1]}
        )
    if found := INCIDENT.fullmatch(rest):
        return Sample(
            "kv_incidents_total", "What went wrong below", {"tier": tier, "kind": found[1]}
        )
    return Sample(f"kv_{rest}", "A figure of this tier", {"tier": tier})


class HTTPMetrics:
    """What is counted as requests are answered."""

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
            self.metrics.requests.labels(route, scope["method"], str(status)).inc()
            self.metrics.seconds.labels(route, str(status)).observe(time.perf_counter() - began)


class MetricsRoute:
    """The route."""

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
        figures: dict[str, float] = {}
        with suppress(LongctxError, TimeoutError):  # it restarts, or a step takes very long
            figures = await asyncio.wait_for(self.engine.stats(), STATS_SECONDS)
        documents = Count(self.library.state(document) for document in self.library.documents())
        info = self.engine.info
        labels = {
            "version": __version__,
            "model": info.model_name,
            "kv_codec": info.kv_codec,
            "device": info.device,
            "dtype": info.dtype,
            "attention_backend": info.backend,
        }
        figures["ranks"] = self.engine.config.ring.ranks
        figures["engine_restarts_total"] = self.engine.restarts
        return Snapshot(figures, self.engine.state, documents, labels)


@dataclass(frozen=True, slots=True, eq=False)  # a registry wants it hashable
class Snapshot:
    """Everything at one moment, as a collector."""

    figures: Mapping[str, float]
    engine_state: State
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
        families: dict[str, Metric] = {}
        for figure, value in self.figures.items():
            sample = sample_of(figure)
            name = f"longctx_{sample.metric}"
            family = families.get(name)
            if family is None:
                kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
                family = families[name] = kind(name, sample.help)
            family.add_sample(name, dict(sample.labels), value)
        yield from families.values()


def _gauge(name: str, text: str, samples: list[tuple[Mapping[str, str], float]]) -> Metric:
    family = GaugeMetricFamily(name, text)
    for labels, value in samples:
        family.add_sample(name, dict(labels), value)
    return family
