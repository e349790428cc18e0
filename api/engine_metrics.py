"""The metrics that come from the engine: one table of names, help and labels.

The engine tells its statistics as a flat mapping of names to numbers. Each row here says which of
those names it exports, with the labels that a name carries in braces: `{tier}_bytes` exports
`device_bytes`, `host_bytes` and `disk_bytes` as `longctx_kv_bytes` with a label `tier`.
"""

import functools
import re
import string
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from offload.tier_names import TIERS

MetricKind = Literal["counter", "gauge"]

# What each label's value looks like inside the name of a statistic.
LABEL_PATTERNS = {
    "tier": "|".join(TIERS),
    "reason": "[a-z]+",
    "kind": "[a-z_]+",
    "group": "[0-9]+",
}


@dataclass(frozen=True, slots=True)
class EngineMetric:
    """Describes one exported metric. Its name ends in its unit, if any, as Prometheus wants it."""

    stat: str  # the engine's name, with labels in braces
    name: str  # without `longctx_`; the name of a counter ends in `_total`
    help: str

    @property
    def kind(self) -> MetricKind:
        return "counter" if self.name.endswith("_total") else "gauge"

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(label for _, label, _, _ in string.Formatter().parse(self.stat) if label)

    def match(self, stat: str) -> dict[str, str] | None:
        """Returns the labels that `stat` carries; None when it is no name of this metric."""
        pattern = "".join(
            re.escape(text) + (f"(?P<{label}>{LABEL_PATTERNS[label]})" if label else "")
            for text, label, _, _ in string.Formatter().parse(self.stat)
        )
        found = re.fullmatch(pattern, stat)
        return None if found is None else found.groupdict()


_ROWS = (
    # Requests
    ("requests_running", "requests_running", "Requests in the current batch"),
    ("requests_waiting", "requests_waiting", "Requests that wait for memory or for each other"),
    ("requests_{reason}_total", "requests_total", "Requests ended"),
    ("steps_total", "steps_total", "Batches computed"),
    ("computed_tokens_total", "computed_tokens_total", "Tokens computed by the model"),
    ("prompt_tokens_total", "prompt_tokens_total", "Tokens in the prompts of ended requests"),
    (
        "cached_tokens_total",
        "cached_tokens_total",
        "Prompt tokens of ended requests that were cached",
    ),
    ("generated_tokens_total", "generated_tokens_total", "Tokens in the answers of ended requests"),
    ("preemptions_total", "preemptions_total", "Sequences preempted for lack of memory"),
    # What the engine knows and holds
    ("documents_open", "documents_open", "Documents that the engine knows"),
    ("modules_open", "modules_open", "Modules of schemas and kept prompts that the engine knows"),
    ("prefixes_held", "prefixes_held", "Prefixes that are complete on the device"),
    ("raw_blocks_held", "raw_blocks_in_use", "Blocks that are being filled"),
    ("group{group}_blocks_held", "kv_group_blocks_in_use", "Blocks of a layer group in use"),
    (
        "group{group}_capacity_blocks",
        "kv_group_capacity_blocks",
        "Blocks of a layer group that fit",
    ),
    # Processes
    ("ranks", "ranks", "Processes that share each prompt"),
    (
        "engine_restarts_total",
        "engine_restarts_total",
        "Times that the engine ended and was restarted",
    ),
    ("ring_sent_bytes_total", "ring_sent_bytes_total", "Bytes that ranks sent to each other"),
    ("ring_wait_seconds_total", "ring_wait_seconds_total", "Time rank 0 waited for other ranks"),
    (
        "ring_link_latency_seconds",
        "ring_link_latency_seconds",
        "Latency between ranks, as measured",
    ),
    (
        "ring_link_bytes_per_second",
        "ring_link_bytes_per_second",
        "Bandwidth between ranks, as measured",
    ),
    # Transfers between tiers
    ("store_queue_bytes", "kv_write_queue_bytes", "Bytes queued for host memory and disk"),
    ("store_loads", "kv_loads_running", "Requests whose blocks are being loaded"),
    ("store_loads_late_total", "kv_loads_late_total", "Loads abandoned because they took too long"),
    ("store_failures_total", "kv_transfer_failures_total", "Transfers that failed unexpectedly"),
    (
        "store_read_bytes_per_second",
        "kv_disk_read_bytes_per_second",
        "Bandwidth of reads from disk, measured lately",
    ),
    # Each tier
    ("{tier}_bytes", "kv_bytes", "Bytes of KV blocks held"),
    ("{tier}_capacity_bytes", "kv_capacity_bytes", "Bytes of KV blocks that may be held"),
    ("{tier}_blocks", "kv_blocks", "KV blocks held, counted once for each layer group"),
    ("{tier}_blocks_held", "kv_blocks_in_use", "KV blocks in use, which are not evicted"),
    ("{tier}_extents", "kv_extents", "Files of KV blocks"),
    ("{tier}_hits_total", "kv_hits_total", "Blocks that were looked for and found"),
    ("{tier}_misses_total", "kv_misses_total", "Blocks that were looked for and not found"),
    ("{tier}_writes_total", "kv_writes_total", "Files written"),
    ("{tier}_read_seconds_total", "kv_read_seconds_total", "Time spent reading blocks"),
    ("{tier}_read_bytes_total", "kv_read_bytes_total", "Bytes of blocks read"),
    ("{tier}_write_seconds_total", "kv_write_seconds_total", "Time spent writing blocks"),
    ("{tier}_write_bytes_total", "kv_write_bytes_total", "Bytes of blocks written"),
    (
        "{tier}_corrupt_files_total",
        "kv_checksum_failures_total",
        "Damaged files, put in quarantine",
    ),
    ("{tier}_quarantine_bytes", "kv_quarantine_bytes", "Bytes of damaged files, kept to look at"),
    ("{tier}_quarantine_files", "kv_quarantine_files", "Damaged files, kept to look at"),
    ("{tier}_writes_off", "kv_writes_off", "1 while nothing is written after a failure"),
    ("{tier}_evictions_{reason}_total", "kv_evictions_total", "Blocks or files evicted"),
    ("{tier}_{kind}_total", "kv_incidents_total", "Faults of a tier, by kind"),
)
# In this order: a name belongs to the first row that it matches.
ENGINE_METRICS = tuple(EngineMetric(*row) for row in _ROWS)


@dataclass(frozen=True, slots=True)
class Sample:
    metric: EngineMetric
    labels: Mapping[str, str]
    value: float


def samples(stats: Mapping[str, float]) -> Iterator[Sample]:
    """Yields every statistic as a sample of its metric; one that no row exports keeps its name."""
    for stat, value in stats.items():
        metric, labels = _metric_of(stat)
        yield Sample(metric, labels, value)


def values(found: Iterable[Sample], name: str, label: str) -> dict[str, float]:
    """Returns the values of the metric of that name, by the value of one of its labels."""
    return {sample.labels[label]: sample.value for sample in found if sample.metric.name == name}


def is_listed(metric: EngineMetric) -> bool:
    return metric in ENGINE_METRICS


@functools.cache
def _metric_of(stat: str) -> tuple[EngineMetric, Mapping[str, str]]:
    for metric in ENGINE_METRICS:
        if (labels := metric.match(stat)) is not None:
            return metric, labels
    return EngineMetric(stat, stat, "A statistic of the engine"), {}
