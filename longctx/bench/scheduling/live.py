"""Serves a small trace with a model and simulates the same one, to see how far they are apart.

The model is served twice: what the first time teaches the cost model is what is simulated, and the
second time is what it is compared with.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np

from longctx.bench.measured_engine import MeasuredEngine
from longctx.bench.scheduling.simulate import Machine, Outcome, Simulation
from longctx.bench.scheduling.traces import Arrival
from longctx.config import EngineConfig
from longctx.embedded import model_path
from longctx.engine.scheduler import Scheduler, SchedulerOutput
from longctx.request import FinishReason, Request, SamplingParams, Segment

SPAN_SECONDS = 12.0
CHATS = 30
DOCUMENTS = (6000, 20_000, 40_000)


@dataclass(frozen=True, slots=True)
class Compared:
    """One figure of the trace that was served, and of the simulated one."""

    figure: str
    unit: str
    live: float
    simulated: float


class _WatchedScheduler(Scheduler):
    """Keeps what each step was predicted to take and what it took."""

    def __init__(self, *parts: Any, **options: Any) -> None:
        super().__init__(*parts, **options)
        self.steps: list[tuple[float, float]] = []

    def update(self, output: SchedulerOutput, seconds: float) -> None:
        super().update(output, seconds)
        measured, predicted = self._last_step
        self.steps.append((predicted, measured))


def small_trace(seed: int) -> list[Arrival]:
    """Draw a few chats and documents that come within seconds."""
    choose = Random(seed)
    asked = [
        Arrival(choose.uniform(0, SPAN_SECONDS), choose.randint(20, 600), choose.randint(20, 100))
        for _ in range(CHATS)
    ]
    asked += [Arrival(choose.uniform(0, SPAN_SECONDS / 2), tokens, 0) for tokens in DOCUMENTS]
    return sorted(asked, key=lambda each: each.seconds)


def compare_live(
    engine: EngineConfig, seed: int, say: Callable[[str], None]
) -> tuple[Compared, ...]:
    """Serve the trace, simulate it with what was learned, and return the figures of both."""
    trace = small_trace(seed)
    folder = engine.model.model or model_path("needle")
    measured = MeasuredEngine(engine, folder, scheduler=_WatchedScheduler)
    scheduler = measured.scheduler
    assert isinstance(scheduler, _WatchedScheduler)
    for number in range(2):
        say(f"served, {number + 1} of 2")
        scheduler.steps.clear()
        live = serve(measured, trace, seed=seed + number)
    live.step_seconds = [seconds for _, seconds in scheduler.steps]
    machine = Machine(
        coefficients=scheduler.cost.coefficients,
        target_seconds=engine.scheduler.target_seconds(measured.info.device),
        pool_tokens=measured.info.capacity_tokens,
        batch_tokens=measured.batch_tokens,
        max_sequences=engine.scheduler.max_sequences,
    )
    simulated = Simulation(machine, Scheduler).run(trace)
    errors = [abs(predicted - seconds) / seconds for predicted, seconds in scheduler.steps]
    return (
        Compared("prediction error, median", "of a step", float(np.median(errors)), 0.0),
        *_figures(live, simulated),
    )


def _figures(live: Outcome, simulated: Outcome) -> list[Compared]:
    pairs = {
        "step": (live.step_seconds, simulated.step_seconds),
        "first token": (
            list(live.first_seconds.values()),
            list(simulated.first_seconds.values()),
        ),
        "between tokens": (live.intervals, simulated.intervals),
        "whole request": (
            list(live.ended_seconds.values()),
            list(simulated.ended_seconds.values()),
        ),
    }
    compared = [
        Compared(
            f"{name} p{percent}",
            "ms",
            1000 * float(np.percentile(ours, percent)),
            1000 * float(np.percentile(theirs, percent)),
        )
        for name, (ours, theirs) in pairs.items()
        for percent in (50, 99)
    ]
    compared.append(Compared("whole trace", "s", live.span_seconds, simulated.span_seconds))
    return compared


def serve(engine: MeasuredEngine, trace: Sequence[Arrival], *, seed: int) -> Outcome:
    """Run the requests of a trace as they come; raises AssertionError where one fails."""
    outcome, choose = Outcome(), Random(seed)
    vocab_size = engine.info.vocab_size
    last_token: dict[str, float] = {}
    began, coming = time.perf_counter(), 0
    while coming < len(trace) or engine.has_work:
        now = time.perf_counter() - began
        while coming < len(trace) and trace[coming].seconds <= now:
            engine.submit(_request(f"{seed}-{coming}", trace[coming], choose, vocab_size))
            coming += 1
        if not engine.has_work:
            time.sleep(max(0.0, trace[coming].seconds - now))
            continue
        for output in engine.step():
            assert output.finish_reason is not FinishReason.ERROR, output.error
            now, name = time.perf_counter() - began, output.request_id
            index = int(name.partition("-")[2])
            for _ in output.token_ids:
                if name in last_token:
                    outcome.intervals.append(now - last_token[name])
                else:
                    outcome.first_seconds[index] = now - trace[index].seconds
                last_token[name] = now
            if output.finished:
                outcome.ended_seconds[index] = now - trace[index].seconds
    outcome.span_seconds = time.perf_counter() - began - trace[0].seconds
    return outcome


def _request(name: str, arrival: Arrival, choose: Random, vocab_size: int) -> Request:
    ids = tuple(choose.randrange(5, vocab_size) for _ in range(arrival.prompt_tokens))
    return Request(
        request_id=name,
        segments=(Segment(token_ids=ids),),
        sampling=SamplingParams(max_tokens=arrival.answer_tokens, temperature=0.0, ignore_eos=True),
        request_class=arrival.request_class,
    )
