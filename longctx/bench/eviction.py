"""Who should leave a full tier? Replays a generated trace against each eviction policy.

Documents are asked by Zipf's law, and some are read once and never again (scans). A question needs
its document's extents from the first to the last; from the first missing one on, they are computed
again, which costs more the later they come. No file is written and no model runs: the policies
are the ones that tiers use, the sizes and times of extents are stated by the options.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

from rich.table import Table

from compress.shape import BLOCK_TOKENS
from longctx.bench.config import BenchConfig, EvictionConfig, RoundsConfig
from longctx.bench.picture import Series, draw_bars
from longctx.bench.report import Parameter, Report, Result
from offload.block_run import EXTENT_BLOCKS
from offload.eviction import POLICIES, Evictable, EvictionPolicy
from offload.key import BlockKey, GroupKey
from offload.units import GIB

EXTENT_TOKENS = EXTENT_BLOCKS * BLOCK_TOKENS
BASELINE = "lru"

Extent = tuple[int, int]  # document, index of the extent in it


@dataclass(frozen=True, slots=True)
class Trace:
    """Questions in order (`asked`: document numbers) and each document's extents (`lengths`)."""

    asked: tuple[int, ...]
    lengths: tuple[int, ...]
    config: EvictionConfig

    @property
    def distinct_bytes(self) -> int:
        """The bytes of all documents but the scanned ones, each counted once."""
        return sum(self.lengths[: self.config.documents]) * self.config.extent_bytes

    def seconds(self, index: int) -> float:
        """Returns the time to compute one extent: its tokens, and attention to all before them."""
        middle = (index + 0.5) * EXTENT_TOKENS
        share_of_attention = middle / self.config.doubling_tokens
        return EXTENT_TOKENS / self.config.tokens_per_second * (1 + share_of_attention)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was computed again although it had been computed before."""

    seconds: float
    extents: int


def make_trace(config: EvictionConfig, *, seed: int) -> Trace:
    """Draws a trace: log-normal lengths, and now and then a new favorite among the documents."""
    random = Random(f"eviction-{seed}")

    def length() -> int:
        tokens = config.median_tokens * math.exp(random.gauss(0.0, config.length_spread))
        return max(1, round(tokens / EXTENT_TOKENS))

    lengths = [length() for _ in range(config.documents)]
    by_rank = random.sample(range(config.documents), config.documents)
    weights = [1 / (rank + 1) ** config.zipf for rank in range(config.documents)]
    cumulative = list(itertools.accumulate(weights))
    asked = []
    for _ in range(config.trace_requests):
        if random.random() < config.scan_share:
            asked.append(len(lengths))
            lengths.append(length())
            continue
        if random.random() < config.drift:
            by_rank.insert(0, by_rank.pop(random.randrange(config.documents)))
        (document,) = random.choices(by_rank, cum_weights=cumulative)
        asked.append(document)
    return Trace(tuple(asked), tuple(lengths), config)


def replay(trace: Trace, policy: EvictionPolicy[Extent], *, capacity_bytes: int) -> Outcome:
    """Returns what the second half of the trace recomputes; the first half fills the tier."""
    room = capacity_bytes // trace.config.extent_bytes
    held: set[Extent] = set()
    known: set[int] = set()  # documents
    seconds, extents = 0.0, 0
    for number, document in enumerate(trace.asked):
        chain = [(document, index) for index in range(trace.lengths[document])]
        present = list(itertools.takewhile(held.__contains__, chain))
        for extent in present:
            policy.used(extent)
        missing = chain[len(present) :]
        if number >= len(trace.asked) // 2 and document in known:
            seconds += sum(trace.seconds(index) for _, index in missing)
            extents += len(missing)
        known.add(document)
        for extent in missing:
            if len(held) == room:
                victim = policy.victim()
                if victim is None or victim == (document, extent[1] - 1):
                    break  # a chain does not displace its own beginning
                held.remove(victim)
                policy.removed(victim)
            held.add(extent)
            policy.added(_entry(trace, extent))
    return Outcome(seconds, extents)


def run(
    bench: BenchConfig,
    rounds: RoundsConfig,
    eviction: EvictionConfig,
    *,
    say: Callable[[str], None],
) -> Report:
    """Replays generated traces against every policy; no engine is started."""
    rows = list(measure(eviction, rounds=rounds.rounds, seed=bench.seed, say=say))
    subtitle = (
        f"{eviction.trace_requests:,} questions on {eviction.documents} documents, "
        f"{eviction.scan_share:.0%} scans, Zipf {eviction.zipf:g}; {rounds.rounds} traces"
    )
    return Report(
        results=tuple(rows), tables=(_table(rows, subtitle),), draw=partial(_draw, rows, subtitle)
    )


def measure(
    config: EvictionConfig, *, rounds: int, seed: int, say: Callable[[str], None]
) -> Iterator[Result]:
    """Yields means over `rounds` traces: recomputed seconds and bytes by capacity and policy."""
    traces = [make_trace(config, seed=seed + number) for number in range(rounds)]
    for percent in config.percent_capacities:
        outcomes: dict[str, Outcome] = {}
        for name in sorted(POLICIES, key=lambda name: name != BASELINE):
            each = [
                replay(
                    trace,
                    POLICIES[name](),
                    capacity_bytes=int(trace.distinct_bytes * percent / 100),
                )
                for trace in traces
            ]
            outcomes[name] = Outcome(
                sum(outcome.seconds for outcome in each) / rounds,
                sum(outcome.extents for outcome in each) // rounds,
            )
            say(f"{percent:g}%, {name}: {outcomes[name].seconds:,.0f} s computed")
        for name, outcome in outcomes.items():
            at: dict[str, Parameter] = {
                "policy": name,
                "capacity_percent": percent,
                "rounds": rounds,
            }
            yield _compared("recomputed prefill", "s", at, outcome, outcomes, _seconds)
            yield _compared("recomputed bytes", "GiB", at, outcome, outcomes, partial(_gib, config))


def _compared(
    metric: str,
    unit: str,
    at: Mapping[str, Parameter],
    outcome: Outcome,
    outcomes: dict[str, Outcome],
    value: Callable[[Outcome], float],
) -> Result:
    own = at["policy"] == BASELINE
    return Result(
        metric=metric,
        value=value(outcome),
        unit=unit,
        parameters=at,
        baseline=None if own else BASELINE,
        baseline_value=None if own else value(outcomes[BASELINE]),
    )


def _seconds(outcome: Outcome) -> float:
    return outcome.seconds


def _gib(config: EvictionConfig, outcome: Outcome) -> float:
    return outcome.extents * config.extent_bytes / GIB


def _entry(trace: Trace, extent: Extent) -> Evictable[Extent]:
    document, index = extent
    return Evictable(
        name=extent,
        size_bytes=trace.config.extent_bytes,
        cost_seconds=trace.seconds(index),
        blocks=(_block(document, index),),
        parent=_block(document, index - 1) if index else None,
    )


def _block(document: int, index: int) -> GroupKey:
    return (0, BlockKey(b"%d-%d" % (document, index)))


def _table(rows: list[Result], subtitle: str) -> Table:
    table = Table(title="What a full tier has to compute again", caption=subtitle)
    for name in ("capacity", "policy", "prefill", "bytes", f"against {BASELINE}"):
        table.add_column(name, justify="right")
    for seconds, size in zip(rows[::2], rows[1::2], strict=True):
        table.add_row(
            f"{seconds.parameters['capacity_percent']:g}%",
            str(seconds.parameters["policy"]),
            f"{seconds.value:,.0f} s",
            f"{size.value:,.1f} GiB",
            "" if seconds.ratio is None else f"{seconds.ratio:.2f}x",
        )
    return table


def _draw(rows: list[Result], subtitle: str, path: Path) -> None:
    times = [row for row in rows if row.metric == "recomputed prefill"]
    percents = list(dict.fromkeys(row.parameters["capacity_percent"] for row in times))
    draw_bars(
        path,
        title="Prefill computed again, by capacity",
        subtitle=subtitle,
        groups=[f"{percent:g}% fit" for percent in percents],
        series=[
            Series(
                label=name,
                values=[row.value / 3600 for row in times if row.parameters["policy"] == name],
            )
            for name in sorted(POLICIES, key=lambda name: name != BASELINE)
        ],
        unit="h",
    )
