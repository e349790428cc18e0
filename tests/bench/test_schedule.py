"""The simulation runs the scheduler that serves, ends every request, and repeats itself."""

import json
import random
import statistics
from pathlib import Path

import pytest

from longctx.bench.config import ScheduleConfig
from longctx.bench.scheduling.live import compare_live
from longctx.bench.scheduling.policies import FirstCome, FixedChunks, PredictedLengths
from longctx.bench.scheduling.schedule import POLICIES, simulated
from longctx.bench.scheduling.simulate import Machine, Simulation
from longctx.bench.scheduling.traces import (
    Arrival,
    beside_chats,
    crowded,
    mixed,
    read_trace,
)
from longctx.cli import main
from longctx.config import CacheConfig, EngineConfig, ModelConfig
from longctx.engine.cost_model import Coefficients, CostModel
from longctx.engine.scheduler import Scheduler
from longctx.errors import InvalidRequest, LongctxError

SMALL = ScheduleConfig(requests=120, documents_read=3, longest_tokens=60_000)
COSTS = Coefficients(*(ms / 1000 for ms in SMALL.costs_ms))
MACHINE = Machine(coefficients=COSTS, target_seconds=0.25, pool_tokens=1 << 18)


@pytest.fixture(scope="module")
def trace() -> list[Arrival]:
    return mixed(SMALL, CostModel(COSTS), seed=1)


def test_a_trace_follows_from_its_seed(trace: list[Arrival]) -> None:
    assert trace == mixed(SMALL, CostModel(COSTS), seed=1)
    assert trace != mixed(SMALL, CostModel(COSTS), seed=2)
    assert len(trace) == 120 and max(each.prompt_tokens for each in trace) == 60_000


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_ends_every_request_and_answers_every_token(
    name: str, trace: list[Arrival]
) -> None:
    outcome = simulated(name, POLICIES[name], MACHINE, trace).outcome
    assert len(outcome.ended_seconds) == len(trace)
    answers = [each for each in trace if each.answer_tokens]
    assert len(outcome.first_seconds) == len(answers)
    assert len(outcome.intervals) == sum(each.answer_tokens - 1 for each in answers)
    assert outcome.computed_tokens >= outcome.tokens - len(answers)
    assert min(outcome.first_seconds.values()) > 0
    again = simulated(name, POLICIES[name], MACHINE, trace).outcome
    assert again == outcome


def test_short_requests_wait_far_less_than_behind_fixed_chunks_or_whole_prompts(
    trace: list[Arrival],
) -> None:
    p99 = {}
    for policy in (Scheduler, FixedChunks, FirstCome):
        times = sorted(simulated("", policy, MACHINE, trace).first_tokens)
        p99[policy] = times[int(0.99 * len(times))]
    assert 10 * p99[Scheduler] < p99[FirstCome]
    assert 2 * p99[Scheduler] < p99[FixedChunks]


def test_steadiness_for_the_short_costs_a_twentieth_of_the_throughput_at_most() -> None:
    few = ScheduleConfig(requests=40, documents_read=1, longest_tokens=300_000)
    trace = mixed(few, CostModel(COSTS), seed=5)
    pace = {
        policy: simulated("", policy, MACHINE, trace).outcome.tokens_per_second
        for policy in (Scheduler, FixedChunks, FirstCome)
    }
    assert pace[Scheduler] > 0.95 * max(pace.values())


def test_a_long_step_varies_less_than_a_short_one() -> None:
    choose = random.Random(6)
    for seconds, most in ((0.05, 0.11), (25.0, 0.011)):
        drawn = [MACHINE.noisy(seconds, choose) / seconds for _ in range(4000)]
        assert statistics.fmean(drawn) == pytest.approx(1.0, abs=0.01)
        assert 0.8 * most < statistics.pstdev(drawn) < most


def test_answers_keep_the_objective_beside_a_document() -> None:
    trace = beside_chats(60_000, 0.05, 20, 0.2, seed=3)
    intervals = sorted(simulated("", Scheduler, MACHINE, trace).outcome.intervals)
    assert intervals[int(0.99 * len(intervals))] < 1.2 * MACHINE.target_seconds


def test_where_a_whole_answer_has_to_have_room_fewer_are_preempted() -> None:
    chats = crowded(100, CostModel(COSTS), busy=1.5, seed=4)
    tight = Machine(coefficients=COSTS, target_seconds=0.25, pool_tokens=3072)
    plain = simulated("", Scheduler, tight, chats).outcome
    predicted = simulated("", PredictedLengths, tight, chats).outcome
    assert plain.preemptions > 0
    assert predicted.preemptions < plain.preemptions
    assert len(predicted.ended_seconds) == len(chats)


def test_what_never_fits_is_said(trace: list[Arrival]) -> None:
    chats = [Arrival(0.0, 100_000, 1)]
    small = Machine(coefficients=COSTS, target_seconds=0.25, pool_tokens=4096)
    with pytest.raises(LongctxError, match=r"raise --pool-tokens"):
        Simulation(small, Scheduler).run(chats)


def test_a_file_of_arrivals_is_read(tmp_path: Path) -> None:
    file = tmp_path / "code.csv"
    file.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:04.0319600,4808,10\n"
        "2023-11-16 18:17:03.9799600,110,27\n",
        encoding="utf-8",
    )
    first, second = read_trace(file)
    assert first == Arrival(0.0, 110, 27)
    assert second.seconds == pytest.approx(0.052, abs=1e-6)
    assert (second.prompt_tokens, second.answer_tokens) == (4808, 10)


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "TIMESTAMP,ContextTokens\n2023-11-16,5\n"])
def test_another_file_is_refused_with_the_columns_that_it_needs(tmp_path: Path, text: str) -> None:
    file = tmp_path / "no-trace.csv"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidRequest, match=r"no-trace\.csv"):
        read_trace(file)


def test_the_benchmark_prints_every_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "longctx.bench.scheduling.schedule"
    monkeypatch.setattr(f"{module}.CAPACITY_LENGTHS", (2048,))
    monkeypatch.setattr(f"{module}.CAPACITY_BUSY", (0.25,))
    monkeypatch.setattr(f"{module}.CAPACITY_HOURS", 0.02)
    main(
        [
            "bench", "schedule", "--requests", "40", "--documents-read", "1",
            "--longest-tokens", "20000", "--out", str(tmp_path),
        ]
    )  # fmt: skip
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    found = {(row["metric"], row.get("scheduler")) for row in record["results"]}
    for policy in POLICIES:
        assert {("first_token_p99", policy), ("throughput", policy)} <= found
    assert ("document_p99", None) in found
    assert (tmp_path / "schedule.png").stat().st_size > 0


@pytest.mark.slow
def test_what_is_simulated_is_near_what_is_served() -> None:
    engine = EngineConfig(
        model=ModelConfig(threads=1), cache=CacheConfig(kv_codec="int8", device_pool_gib=0.5)
    )
    compared = {each.figure: each for each in compare_live(engine, 0, lambda _: None)}
    for figure in ("step p50", "whole trace"):
        each = compared[figure]
        assert 0.5 < each.simulated / each.live < 2, each
