"""`longctx bench check` fails when quality leaves its interval, and says which and how far."""

import json
from pathlib import Path
from typing import Any

import pytest

from longctx.bench.check import Figure, Judged, figures, judge
from longctx.bench.report import Parameter, Result
from longctx.cli import main

BASELINE = Path(__file__).parents[2] / "docs" / "baseline.json"


def figure(metric: str, value: float, low: float, high: float) -> Figure:
    return Figure(metric=metric, at={"codec": "int8"}, value=value, low=low, high=high)


@pytest.mark.parametrize(
    ("before", "now", "worse_by", "better"),
    [
        (figure("recall", 0.9, 0.8, 0.95), 0.8, 0.0, False),
        (figure("recall", 0.9, 0.8, 0.95), 0.7, 0.1, False),
        (figure("recall", 0.9, 0.8, 0.95), 1.0, 0.0, True),
        (figure("KL", 2e-4, 1e-4, 3e-4), 3e-4, 0.0, False),
        (figure("KL", 2e-4, 1e-4, 3e-4), 5e-4, 2e-4, False),
        (figure("KL", 2e-4, 1e-4, 3e-4), 5e-5, 0.0, True),
        (figure("flips", 0.0, -0.01, 0.01), 0.0, 0.0, False),
    ],
)
def test_only_worse_than_the_interval_fails(
    before: Figure, now: float, worse_by: float, better: bool
) -> None:
    (judged,) = judge("ruler", [before], [figure(before.metric, now, 0.0, 1.0)])
    assert judged.worse_by == pytest.approx(worse_by)
    assert judged.holds == (worse_by == 0) and judged.better == better


def test_what_is_not_measured_any_more_fails() -> None:
    before = figure("recall", 0.9, 0.8, 0.95)
    for now in ([], [figure("exact match", 0.9, 0.8, 0.95)]):
        (judged,) = judge("ruler", [before], now)
        assert not judged.holds
        assert str(judged) == ("ruler: recall (int8) is not measured any more; it was 0.8 to 0.95")


def test_figures_are_those_of_quality_that_have_an_interval() -> None:
    share: dict[str, Parameter] = {"model": "m", "n": 5, "low": 0.5, "high": 1.0}
    rows = [
        Result(metric="recall", value=1.0, unit="share", parameters=share),
        Result(metric="recall", value=1.0, unit="share", parameters={**share, "depth_percent": 0}),
        Result(metric="time to first token", value=1.0, unit="s", parameters={"model": "m"}),
        Result(metric="KL", value=1e-4, unit="", parameters={"error": 1e-5, "device": "cpu"}),
    ]
    flips = {"error": 0.0, "tokens": 100}
    rows.append(Result(metric="flips", value=0.0, unit="share", parameters=flips))
    recall, kl, none = figures(rows)
    assert none.low == 0 and none.high == pytest.approx(0.037, abs=1e-3)
    assert recall == Figure(metric="recall", at={"model": "m"}, value=1.0, low=0.5, high=1.0)
    assert (kl.at, kl.low, kl.high) == ({}, pytest.approx(9e-5), pytest.approx(1.1e-4))


def test_a_figure_says_what_it_is_and_by_how_much_it_is_worse() -> None:
    judged = Judged(bench="ruler", before=figure("recall", 0.9, 0.8, 0.95), now=0.5)
    assert str(judged) == (
        "ruler: recall (int8) is 0.5, worse by 0.3 than its interval of 0.8 to 0.95"
    )


def test_quality_is_what_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    """The baseline that comes along, measured again."""
    main(["bench", "check", "--baseline", str(BASELINE)])
    record = json.loads(capsys.readouterr().out.rstrip("\n").split("\n")[-1])
    held = [row["holds"] for row in record["results"][:-1]]
    assert len(held) > 20 and all(held)


def written(tmp_path: Path, low: float) -> Path:
    run: dict[str, Any] = {
        "bench": "eviction",
        "options": ["--rounds", "1", "--trace-requests", "40", "--documents", "4"],
    }
    at = {"codec": "int8"}
    run["figures"] = [{"metric": "recall", "at": at, "value": 1.0, "low": low, "high": 1.0}]
    file = tmp_path / "baseline.json"
    file.write_text(json.dumps({"runs": [run]}))
    return file


def test_a_failure_ends_the_command_with_1_after_the_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, low=0.9)
    words = ["bench", "check", "--baseline", str(file), "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"longctx: eviction: recall \(int8\) is not measured"):
        main(words)
    record = json.loads(capsys.readouterr().out.rstrip("\n").split("\n")[-1])
    assert record["results"][-1] == {"metric": "figures that fail", "value": 1, "unit": "figures"}
    assert (tmp_path / "check.png").read_bytes().startswith(b"\x89PNG")
    main([*words, "--renew"])
    assert json.loads(file.read_text())["runs"][0]["figures"] == []
    with pytest.raises(SystemExit, match="has no figures yet; --renew measures them"):
        main(words)


@pytest.mark.parametrize(
    "content",
    [
        "no JSON",
        "{}",
        '{"runs": [{"bench": "other", "options": []}]}',
        '{"runs": [{"bench": "check", "options": []}]}',
        '{"runs": [{"bench": "niah", "options": [1]}]}',
        '{"runs": [{"bench": "niah", "options": [], "figures": [{"metric": "KL"}]}]}',
    ],
)
def test_a_file_that_is_no_baseline_is_named(tmp_path: Path, content: str) -> None:
    file = tmp_path / "other.json"
    file.write_text(content)
    with pytest.raises(SystemExit, match=r"other\.json is no baseline"):
        main(["bench", "check", "--baseline", str(file)])


def test_without_a_baseline_the_cure_is_said() -> None:
    with pytest.raises(SystemExit, match=r"such as --baseline docs/baseline\.json"):
        main(["bench", "check"])
