"""Schedulers compared without a model: the same requests, the same machine, virtual time.

The scheduler that serves runs beside others that are known (`policies.py`), on a trace of chats and
documents drawn from a seed or read from a file. A second table has chats in a device that is too
small for them, with and without predicted lengths of answers; a third one says how many documents
of which length the machine bears beside chats, and how long they take. With `live` a small trace is
served by the model too, which says how far the simulation is from what happens.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from rich.table import Table

from compress.shape import BLOCK_TOKENS
from longctx.bench.config import BenchConfig, ScheduleConfig
from longctx.bench.picture import Series, draw_bars
from longctx.bench.report import Parameter, Report, Result
from longctx.bench.scheduling.live import Compared, compare_live
from longctx.bench.scheduling.policies import (
    FirstCome,
    FixedChunks,
    PredictedLengths,
    SkipJoinQueues,
)
from longctx.bench.scheduling.simulate import Machine, Outcome, Simulation
from longctx.bench.scheduling.traces import (
    Arrival,
    alone_seconds,
    beside_chats,
    crowded,
    mixed,
    read_trace,
)
from longctx.config import EngineConfig
from longctx.engine.cost_model import Coefficients, CostModel
from longctx.engine.scheduler import Scheduler

POLICIES: dict[str, type[Scheduler]] = {
    "longctx": Scheduler,
    "fixed chunks": FixedChunks,
    "first come": FirstCome,
    "skip-join queues": SkipJoinQueues,
}
WHOLE_PROMPTS = (FirstCome, SkipJoinQueues)
CROWDED_BUSY = (0.7, 1.1)
CROWDED_POOL_TOKENS = 4096
CAPACITY_LENGTHS = (8192, 32_768, 131_072)
CAPACITY_BUSY = (0.25, 0.5, 0.75)  # part of the time that the documents take
CAPACITY_HOURS = 1.0
CAPACITY_CHATS = 0.1  # a second


@dataclass(frozen=True, slots=True)
class Run:
    """One policy on one trace."""

    policy: str
    trace: Sequence[Arrival]
    outcome: Outcome

    @property
    def first_tokens(self) -> list[float]:
        """Seconds to the first token of the short requests."""
        times = self.outcome.first_seconds
        return [times[index] for index, each in enumerate(self.trace) if each.short]

    @property
    def read_seconds(self) -> list[float]:
        """Seconds until each document was computed."""
        times = self.outcome.ended_seconds
        return [times[index] for index, each in enumerate(self.trace) if not each.answer_tokens]


@dataclass(frozen=True, slots=True)
class Capacity:
    """Documents of one length beside chats."""

    tokens: int
    per_hour: float
    busy: float
    run: Run


def run(
    engine: EngineConfig,
    bench: BenchConfig,
    schedule: ScheduleConfig,
    *,
    say: Callable[[str], None],
) -> Report:
    """Simulate all policies on one trace, then the crowd, then the documents."""
    coefficients = Coefficients(*(ms / 1000 for ms in schedule.costs_ms))
    machine = Machine(
        coefficients=coefficients,
        target_seconds=engine.scheduler.target_seconds("cpu"),
        pool_tokens=schedule.pool_tokens,
        batch_tokens=engine.scheduler.batch_tokens("cpu"),
        max_sequences=engine.scheduler.max_sequences,
    )
    cost = CostModel(coefficients)
    trace = (
        mixed(schedule, cost, seed=bench.seed)
        if schedule.trace_file is None
        else read_trace(schedule.trace_file)
    )
    runs = []
    for name, policy in POLICIES.items():
        say(name)
        runs.append(simulated(name, policy, machine, trace))
    crowds: dict[float, list[Run]] = {}
    for busy in CROWDED_BUSY:
        say(f"crowded, {100 * busy:.0f}% busy")
        requests = min(300, schedule.requests)
        chats = crowded(requests, cost, busy=busy, seed=bench.seed)
        small = replace(machine, pool_tokens=CROWDED_POOL_TOKENS)
        crowds[busy] = [
            simulated("longctx", Scheduler, small, chats),
            simulated("with predicted lengths", PredictedLengths, small, chats),
        ]
    capacities = list(_capacities(machine, cost, bench.seed, say))
    compared = compare_live(engine, bench.seed, say) if schedule.live else ()
    parameters: dict[str, Parameter] = {
        "step_costs": schedule.step_costs,
        "target_step_ms": 1000 * machine.target_seconds,
        "requests": len(trace),
        "trace": "mixed" if schedule.trace_file is None else schedule.trace_file.name,
    }
    tables = [_policy_table(runs), _crowd_table(crowds), _capacity_table(capacities)]
    if compared:
        tables.append(_live_table(compared))
    return Report(
        results=(
            *_policy_results(runs, parameters),
            *_crowd_results(crowds, parameters),
            *_capacity_results(capacities, parameters),
            *_live_results(compared),
        ),
        tables=tuple(tables),
        draw=partial(_draw, runs),
    )


def longest(trace: Sequence[Arrival]) -> int:
    """Return how many tokens the longest request of a trace has at its end."""
    return max(each.prompt_tokens + each.answer_tokens for each in trace)


def simulated(
    name: str, policy: type[Scheduler], machine: Machine, trace: Sequence[Arrival]
) -> Run:
    """Run one policy; those that compute prompts whole get steps as large as the longest one, and
    those that swap for nothing a device that holds everybody."""
    pool_tokens = max(machine.pool_tokens, longest(trace) + 2 * BLOCK_TOKENS)
    if policy in WHOLE_PROMPTS:
        machine = replace(machine, batch_tokens=longest(trace) + machine.max_sequences)
    if policy is SkipJoinQueues:
        everybody = sum(each.prompt_tokens + each.answer_tokens for each in trace)
        pool_tokens = max(pool_tokens, min(4 * pool_tokens, everybody))
    machine = replace(machine, pool_tokens=pool_tokens)
    return Run(name, trace, Simulation(machine, policy).run(trace))


def _capacities(
    machine: Machine, cost: CostModel, seed: int, say: Callable[[str], None]
) -> Iterator[Capacity]:
    for tokens in CAPACITY_LENGTHS:
        alone = alone_seconds(Arrival(0.0, tokens, 0), cost)
        for busy in CAPACITY_BUSY:
            say(f"documents of {tokens:,} tokens, {100 * busy:.0f}% of the time")
            per_hour = busy * 3600 / alone
            trace = beside_chats(tokens, CAPACITY_HOURS, per_hour, CAPACITY_CHATS, seed=seed)
            yield Capacity(tokens, per_hour, busy, simulated("longctx", Scheduler, machine, trace))


# -- what is reported -------------------------------------------------------------------------


def _summary(seconds: Sequence[float]) -> tuple[float, float, float]:
    """Mean, median and 99%, in ms."""
    if not seconds:
        return 0.0, 0.0, 0.0
    middle, high = np.percentile(seconds, [50, 99])
    return 1000 * float(np.mean(seconds)), 1000 * float(middle), 1000 * float(high)


def _ms(seconds: Sequence[float]) -> str:
    return " / ".join(f"{value:,.0f}" for value in _summary(seconds))


def _policy_table(runs: Sequence[Run]) -> Table:
    trace = runs[0].trace
    table = Table(
        title="Schedulers on one trace, simulated; ms as mean / p50 / p99",
        caption=f"{len(trace):,} requests, {sum(each.short for each in trace):,} of them short",
    )
    for name in ("scheduler", "first token, short", "between tokens", "documents, s", "tokens/s"):
        table.add_column(name, justify="left" if name == "scheduler" else "right")
    for each in runs:
        read = each.read_seconds
        table.add_row(
            each.policy,
            _ms(each.first_tokens),
            _ms(each.outcome.intervals),
            f"{np.mean(read):,.0f}" if read else "",
            f"{each.outcome.tokens_per_second:,.1f}",
        )
    return table


def _crowd_table(crowds: dict[float, list[Run]]) -> Table:
    table = Table(
        title="Chats on a device too small for them, simulated; ms as mean / p50 / p99",
        caption="computed: tokens, of those that were asked and answered",
    )
    for name in ("busy", "", "first token", "between tokens", "preempted", "computed", "tokens/s"):
        table.add_column(name, justify="right")
    for busy, runs in crowds.items():
        for each in runs:
            outcome = each.outcome
            table.add_row(
                f"{100 * busy:.0f}%",
                each.policy,
                _ms(each.first_tokens),
                _ms(outcome.intervals),
                f"{outcome.preemptions:,}",
                f"{100 * outcome.computed_tokens / outcome.tokens:.0f}%",
                f"{outcome.tokens_per_second:,.1f}",
            )
    return table


def _capacity_table(capacities: Sequence[Capacity]) -> Table:
    table = Table(
        title=f"Documents beside {CAPACITY_CHATS:g} chats a second, simulated",
        caption="s until a document is computed; ms of the chats",
    )
    for name in ("tokens", "an hour", "busy", "median", "p99", "first token p99", "between p99"):
        table.add_column(name, justify="right")
    for each in capacities:
        middle, high = np.percentile(each.run.read_seconds, [50, 99])
        table.add_row(
            f"{each.tokens:,}",
            f"{each.per_hour:,.1f}",
            f"{100 * each.busy:.0f}%",
            f"{middle:,.0f}",
            f"{high:,.0f}",
            f"{_summary(each.run.first_tokens)[2]:,.0f}",
            f"{_summary(each.run.outcome.intervals)[2]:,.0f}",
        )
    return table


def _live_table(compared: Sequence[Compared]) -> Table:
    table = Table(title="A small trace, served and simulated")
    for name in ("", "served", "simulated", "ratio"):
        table.add_column(name, justify="right")
    for each in compared:
        table.add_row(
            f"{each.figure}, {each.unit}",
            f"{each.live:,.4g}",
            f"{each.simulated:,.4g}",
            f"{each.simulated / each.live:.2f}" if each.live else "",
        )
    return table


def _policy_results(runs: Sequence[Run], parameters: dict[str, Parameter]) -> Iterator[Result]:
    for each in runs:
        figures = {"first_token": each.first_tokens, "inter_token": each.outcome.intervals}
        at: dict[str, Parameter] = {**parameters, "scheduler": each.policy}
        for name, seconds in figures.items():
            for statistic, value in zip(("mean", "p50", "p99"), _summary(seconds), strict=True):
                yield Result(metric=f"{name}_{statistic}", value=value, unit="ms", parameters=at)
        yield Result(
            metric="throughput",
            value=each.outcome.tokens_per_second,
            unit="tokens/s",
            parameters=at,
        )


def _crowd_results(
    crowds: dict[float, list[Run]], parameters: dict[str, Parameter]
) -> Iterator[Result]:
    for busy, runs in crowds.items():
        for each in runs:
            at: dict[str, Parameter] = {**parameters, "scheduler": each.policy, "busy": busy}
            at["trace"] = "crowded"
            figures = {
                "first_token_p99": (_summary(each.first_tokens)[2], "ms"),
                "inter_token_p99": (_summary(each.outcome.intervals)[2], "ms"),
                "preemptions": (float(each.outcome.preemptions), "count"),
                "throughput": (each.outcome.tokens_per_second, "tokens/s"),
            }
            for metric, (value, unit) in figures.items():
                yield Result(metric=metric, value=value, unit=unit, parameters=at)


def _capacity_results(
    capacities: Sequence[Capacity], parameters: dict[str, Parameter]
) -> Iterator[Result]:
    for each in capacities:
        at: dict[str, Parameter] = {
            **parameters,
            "trace": "documents beside chats",
            "document_tokens": each.tokens,
            "per_hour": round(each.per_hour, 2),
        }
        high = float(np.percentile(each.run.read_seconds, 99))
        yield Result(metric="document_p99", value=high, unit="s", parameters=at)


def _live_results(compared: Sequence[Compared]) -> Iterator[Result]:
    for each in compared:
        yield Result(
            metric=f"simulated {each.figure}",
            value=each.simulated,
            unit=each.unit,
            parameters={"live": each.live},
        )


def _draw(runs: Sequence[Run], path: Path) -> None:
    draw_bars(
        path,
        title="Time to the first token of short requests (p99), simulated",
        subtitle=f"{len(runs[0].trace):,} requests; logarithmic",
        groups=["short requests"],
        series=[
            Series(label=each.policy, values=[_summary(each.first_tokens)[2]]) for each in runs
        ],
        unit="ms",
        logarithmic=True,
    )
