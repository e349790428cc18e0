"""The replay counts what it should, and every policy does better than a tier without room."""

from dataclasses import replace
from pathlib import Path

import pytest

from longctx.bench.config import BenchConfig, EvictionConfig, RoundsConfig
from longctx.bench.eviction import Trace, make_trace, measure, replay, run
from offload.eviction import LRU, POLICIES

SMALL = EvictionConfig(documents=30, trace_requests=300, median_tokens=4096, capacities="20,100")
ONE_SECOND = replace(SMALL, tokens_per_second=1024.0, doubling_tokens=10**12, extent_bytes=10)


def test_a_trace_follows_from_its_seed() -> None:
    assert make_trace(SMALL, seed=1) == make_trace(SMALL, seed=1)
    assert make_trace(SMALL, seed=1) != make_trace(SMALL, seed=2)


def test_scans_are_asked_once() -> None:
    trace = make_trace(SMALL, seed=1)
    scanned = [document for document in trace.asked if document >= SMALL.documents]
    assert len(scanned) == len(set(scanned)) == len(trace.lengths) - SMALL.documents
    assert 30 <= len(scanned) <= 90


def test_the_replay_counts_by_hand() -> None:
    # Document 0 has two extents, document 1 one; the first two questions only fill the tier.
    trace = Trace(asked=(0, 1, 0, 1), lengths=(2, 1), config=ONE_SECOND)
    assert replay(trace, LRU(), capacity_bytes=30).seconds == 0
    # 0 0, then 1 displaces 0's leaf; 0 computes it again and displaces 1; then 1 is computed again
    outcome = replay(trace, LRU(), capacity_bytes=20)
    assert outcome.extents == 2
    assert outcome.seconds == pytest.approx(2.0, rel=1e-6)


def test_what_was_never_seen_is_not_computed_again() -> None:
    trace = Trace(asked=(0, 1, 2, 3), lengths=(1, 1, 1, 1), config=ONE_SECOND)
    assert replay(trace, LRU(), capacity_bytes=10).extents == 0


def test_late_extents_cost_more() -> None:
    trace = make_trace(SMALL, seed=1)
    seconds = [trace.seconds(index) for index in (0, 10, 32)]
    assert seconds == sorted(seconds)
    assert trace.seconds(32) == pytest.approx(2 * trace.seconds(0), rel=0.03)


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_more_room_means_less_to_compute(name: str) -> None:
    trace = make_trace(SMALL, seed=3)
    seconds = [
        replay(
            trace, POLICIES[name](), capacity_bytes=trace.distinct_bytes * percent // 100
        ).seconds
        for percent in (0, 10, 40, 300)
    ]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[-1] == 0


def test_results_compare_each_policy_with_lru() -> None:
    rows = list(measure(SMALL, rounds=2, seed=0, say=print))
    assert len(rows) == 2 * 2 * len(POLICIES)
    for row in rows:
        assert (row.baseline == "lru") == (row.parameters["policy"] != "lru")
    times = {row.parameters["policy"]: row for row in rows if row.unit == "s"}
    assert times["gdsf"].value > 0


def test_the_report_has_a_table_and_a_picture(tmp_path: Path) -> None:
    report = run(BenchConfig(), RoundsConfig(rounds=1), SMALL, say=print)
    report.draw(tmp_path / "eviction.png")
    assert (tmp_path / "eviction.png").stat().st_size > 1000
    assert len(report.tables) == 1
