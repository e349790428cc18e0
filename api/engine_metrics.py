"""The metrics that come from the engine: one table of names, help, and where the values are read.

A row reads its samples from `EngineStats`, one for each combination of its labels: `kv_bytes` has
one for each tier that the engine has. What an engine does not have gives no sample.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from longctx.engine_stats import ClassStats, EngineStats, GroupStats, RingStats
from offload.stats import StoreStats, TierStats

MetricKind = Literal["counter", "gauge"]
SHARED_LABELS = ("model_name",)
Sample = tuple[tuple[str, ...], float]  # the labels' values, in the order of the row's labels


@dataclass(frozen=True, slots=True)
class EngineMetric:
    """Describes one exported metric. Its name ends in its unit, if any, as Prometheus wants it."""

    name: str  # without what it begins with; the name of a counter ends in `_total`
    help: str
    labels: tuple[str, ...]
    samples: Callable[[EngineStats], Iterator[Sample]]
    shared: bool = False  # vLLM has it too, by this name and with this meaning

    @property
    def kind(self) -> MetricKind:
        return "counter" if self.name.endswith("_total") else "gauge"

    def family(
        self, stats: EngineStats, *, prefix: str, model: str
    ) -> CounterMetricFamily | GaugeMetricFamily:
        """Returns the metric with its samples, as a registry takes it.

        What vLLM has too begins with `prefix` and a colon, and has a label with the `model`.
        """
        kind = CounterMetricFamily if self.kind == "counter" else GaugeMetricFamily
        name = f"{prefix}:{self.name}" if self.shared else f"longctx_{self.name}"
        own = (model,) if self.shared else ()
        family = kind(name, self.help, labels=(*(SHARED_LABELS if own else ()), *self.labels))
        for labels, value in self.samples(stats):
            family.add_metric((*own, *labels), value)
        return family


def _engine(
    name: str, help: str, read: Callable[[EngineStats], float], *, shared: bool = False
) -> EngineMetric:
    def samples(stats: EngineStats) -> Iterator[Sample]:
        yield (), read(stats)

    return EngineMetric(name, help, (), samples, shared)


def _group(name: str, help: str, read: Callable[[GroupStats], float]) -> EngineMetric:
    def samples(stats: EngineStats) -> Iterator[Sample]:
        for index, group in enumerate(stats.groups):
            yield (str(index),), read(group)

    return EngineMetric(name, help, ("group",), samples)


def _ring(name: str, help: str, read: Callable[[RingStats], float]) -> EngineMetric:
    def samples(stats: EngineStats) -> Iterator[Sample]:
        if stats.ring is not None:
            yield (), read(stats.ring)

    return EngineMetric(name, help, (), samples)


def _store(name: str, help: str, read: Callable[[StoreStats], float]) -> EngineMetric:
    def samples(stats: EngineStats) -> Iterator[Sample]:
        if stats.store is not None:
            yield (), read(stats.store)

    return EngineMetric(name, help, (), samples)


def _tier(name: str, help: str, read: Callable[[TierStats], float | None]) -> EngineMetric:
    """Makes a metric with a sample for each tier of which `read` returns a number."""

    def samples(stats: EngineStats) -> Iterator[Sample]:
        for tier, tier_stats in stats.tiers.items():
            value = read(tier_stats)
            if value is not None:
                yield (tier,), value

    return EngineMetric(name, help, ("tier",), samples)


def _requests_ended(stats: EngineStats) -> Iterator[Sample]:
    for reason, count in stats.requests_ended.items():
        yield (reason.value,), count


def _prompt_tokens(stats: EngineStats) -> Iterator[Sample]:
    for source, tokens in stats.prompt_tokens_by_source.items():
        yield (source,), tokens


def _evictions(stats: EngineStats) -> Iterator[Sample]:
    for tier, tier_stats in stats.tiers.items():
        for reason, count in tier_stats.evictions.items():
            yield (tier, reason), count


def _classes(read: Callable[[ClassStats], float]) -> Callable[[EngineStats], Iterator[Sample]]:
    def samples(stats: EngineStats) -> Iterator[Sample]:
        for name, each in stats.scheduler.classes.items():
            yield (name,), read(each)

    return samples


def _cost_terms(stats: EngineStats) -> Iterator[Sample]:
    for term, seconds in stats.scheduler.seconds_per.items():
        yield (term,), seconds


def _prediction_error(stats: EngineStats) -> Iterator[Sample]:
    if stats.scheduler.prediction_error is not None:
        yield (), stats.scheduler.prediction_error


def _incidents(stats: EngineStats) -> Iterator[Sample]:
    for tier, tier_stats in stats.tiers.items():
        for kind, count in tier_stats.incidents.items():
            yield (tier, kind), count


ENGINE_METRICS = (
    # Requests
    _engine(
        "num_requests_running",
        "Requests in the current batch",
        lambda engine: engine.requests_running,
        shared=True,
    ),
    _engine(
        "num_requests_waiting",
        "Requests that wait for memory or for each other",
        lambda engine: engine.requests_waiting,
        shared=True,
    ),
    EngineMetric(
        "requests_total",
        "Requests ended, those that compute documents among them",
        ("reason",),
        _requests_ended,
    ),
    _engine("steps_total", "Batches computed", lambda engine: engine.steps),
    EngineMetric(
        "step_parts_seconds_total",
        "Time of steps by what it went to; on a GPU, layers wait for what the others launched",
        ("part",),
        lambda engine: (((part,), seconds) for part, seconds in engine.step_seconds.items()),
    ),
    _engine(
        "computed_tokens_total",
        "Tokens computed by the model",
        lambda engine: engine.computed_tokens,
    ),
    _engine(
        "prompt_tokens_total",
        "Tokens in the prompts of ended requests",
        lambda engine: engine.prompt_tokens,
        shared=True,
    ),
    EngineMetric(
        "prompt_tokens_by_source_total",
        "Tokens in the prompts of ended requests: computed, found in a tier, or none of these, "
        "where a request ended before it reached them",
        ("source",),
        _prompt_tokens,
    ),
    _engine(
        "prefix_cache_hits_total",
        "Prompt tokens of ended requests that were cached",
        lambda engine: engine.cached_tokens,
        shared=True,
    ),
    _engine(
        "generation_tokens_total",
        "Tokens in the answers of ended requests",
        lambda engine: engine.generated_tokens,
        shared=True,
    ),
    _engine(
        "num_preemptions_total",
        "Sequences preempted for lack of memory",
        lambda engine: engine.preemptions,
        shared=True,
    ),
    # The scheduler
    _engine(
        "target_step_seconds",
        "Longest step that the scheduler aims at beside answers",
        lambda engine: engine.scheduler.target_step_seconds,
    ),
    _engine(
        "step_seconds", "What the last step took", lambda engine: engine.scheduler.step_seconds
    ),
    _engine(
        "predicted_step_seconds",
        "What the last step was predicted to take",
        lambda engine: engine.scheduler.predicted_seconds,
    ),
    EngineMetric(
        "step_cost_seconds", "Cost model: seconds for each unit of work", ("term",), _cost_terms
    ),
    EngineMetric(
        "step_prediction_error",
        "Median error of the last predictions, as a part of what was measured",
        (),
        _prediction_error,
    ),
    _engine("tenants", "Tenants with requests", lambda engine: engine.scheduler.tenants),
    EngineMetric(
        "class_share_seconds",
        "Time that prompts of a class may take of the next step beside answers",
        ("class",),
        _classes(lambda each: each.share_seconds_left),
    ),
    EngineMetric(
        "class_running",
        "Sequences of a class in the current batch",
        ("class",),
        _classes(lambda each: each.running),
    ),
    EngineMetric(
        "class_waiting",
        "Sequences of a class that wait",
        ("class",),
        _classes(lambda each: each.waiting),
    ),
    EngineMetric(
        "class_prompt_tokens_left",
        "Prompt tokens of a class that are to be computed",
        ("class",),
        _classes(lambda each: each.prompt_tokens_left),
    ),
    # What the engine knows and holds
    _engine(
        "documents_open", "Documents that the engine knows", lambda engine: engine.documents_open
    ),
    _engine(
        "modules_open",
        "Modules of schemas and kept prompts that the engine knows",
        lambda engine: engine.modules_open,
    ),
    _engine(
        "prefixes_held",
        "Prefixes that are complete on the device",
        lambda engine: engine.prefixes_held,
    ),
    _engine(
        "raw_blocks_in_use", "Blocks that are being filled", lambda engine: engine.raw_blocks_in_use
    ),
    _group(
        "kv_group_blocks_in_use",
        "Blocks of a layer group in use",
        lambda group: group.blocks_in_use,
    ),
    _group(
        "kv_group_capacity_blocks",
        "Blocks of a layer group that fit",
        lambda group: group.capacity_blocks,
    ),
    # Ranks
    _ring(
        "ring_sent_bytes_total", "Bytes that ranks sent to each other", lambda ring: ring.sent_bytes
    ),
    _ring(
        "ring_wait_seconds_total",
        "Time rank 0 waited for other ranks",
        lambda ring: ring.wait_seconds,
    ),
    _ring(
        "ring_link_latency_seconds",
        "Latency between ranks, as measured",
        lambda ring: ring.link_latency_seconds,
    ),
    _ring(
        "ring_link_bytes_per_second",
        "Bandwidth between ranks, as measured",
        lambda ring: ring.link_bytes_per_second,
    ),
    # Transfers between tiers
    _store(
        "kv_write_queue_bytes",
        "Bytes queued for host memory and disk",
        lambda store: store.queued_bytes,
    ),
    _store(
        "kv_loads_running",
        "Requests whose blocks are being loaded",
        lambda store: store.loads_running,
    ),
    _store(
        "kv_loads_late_total",
        "Loads abandoned because they took too long",
        lambda store: store.loads_late,
    ),
    _store(
        "kv_transfer_failures_total",
        "Transfers that failed unexpectedly",
        lambda store: store.failures,
    ),
    _store(
        "kv_disk_read_bytes_per_second",
        "Bandwidth of reads from disk, measured lately",
        lambda store: store.read_bytes_per_second,
    ),
    # Each tier
    _tier("kv_bytes", "Bytes of KV blocks held", lambda tier: tier.held_bytes),
    _tier(
        "kv_capacity_bytes", "Bytes of KV blocks that may be held", lambda tier: tier.capacity_bytes
    ),
    _tier(
        "kv_blocks", "KV blocks held, counted once for each layer group", lambda tier: tier.blocks
    ),
    _tier(
        "kv_blocks_in_use",
        "KV blocks in use, which are not evicted",
        lambda tier: tier.blocks_in_use,
    ),
    _tier("kv_extents", "Files of KV blocks", lambda tier: tier.extents),
    _tier("kv_hits_total", "Blocks that were looked for and found", lambda tier: tier.hits),
    _tier("kv_misses_total", "Blocks that were looked for and not found", lambda tier: tier.misses),
    _tier("kv_writes_total", "Files written", lambda tier: tier.extents_written),
    _tier("kv_read_seconds_total", "Time spent reading blocks", lambda tier: tier.read_seconds),
    _tier("kv_read_bytes_total", "Bytes of blocks read", lambda tier: tier.read_bytes),
    _tier("kv_write_seconds_total", "Time spent writing blocks", lambda tier: tier.write_seconds),
    _tier("kv_write_bytes_total", "Bytes of blocks written", lambda tier: tier.write_bytes),
    _tier(
        "kv_checksum_failures_total",
        "Damaged files, put in quarantine",
        lambda tier: tier.corrupt_files,
    ),
    _tier(
        "kv_quarantine_bytes",
        "Bytes of damaged files, kept to look at",
        lambda tier: tier.quarantine_bytes,
    ),
    _tier(
        "kv_quarantine_files", "Damaged files, kept to look at", lambda tier: tier.quarantine_files
    ),
    _tier(
        "kv_writes_off", "1 while nothing is written after a failure", lambda tier: tier.writes_off
    ),
    EngineMetric("kv_evictions_total", "Blocks or files evicted", ("tier", "reason"), _evictions),
    EngineMetric("kv_incidents_total", "Faults of a tier, by kind", ("tier", "kind"), _incidents),
)
