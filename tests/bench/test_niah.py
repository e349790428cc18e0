"""The needle benchmark counts strictly, knows its uncertainty, and runs through the real engine."""

import json
from pathlib import Path

import pytest

from longctx.bench.scores import matches, wilson
from longctx.cli import main


@pytest.mark.parametrize(
    ("right", "asked", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (98, 100, 0.93, 0.9945)],
)
def test_wilson_interval(right: int, asked: int, low: float, high: float) -> None:
    assert wilson(right, asked) == pytest.approx((low, high), abs=1e-4)


def test_exact_is_the_whole_value() -> None:
    assert matches(" 7134\n", "7134", "exact")
    assert not matches("It is 7134.", "7134", "exact")
    assert not matches("713", "7134", "exact")


@pytest.mark.parametrize(
    ("given", "counts"),
    [
        ("It is 7134.", True),
        ("71345", False),
        ("17.7134", False),
        ("K-7134", False),
        ("7134", True),
    ],
)
def test_contains_is_the_value_on_its_own(given: str, counts: bool) -> None:
    assert matches(given, "7134", "contains") is counts


def test_a_grid_runs_end_to_end(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--lengths 512,1024 --depths 0,100 --questions 1 --answer-tokens 4 --threads 1"
    out = tmp_path / "out"
    main(["bench", "niah", "--model", str(model), "--out", str(out), *options.split()])
    record = json.loads(capsys.readouterr().out.rstrip("\n").split("\n")[-1])
    assert record["bench"] == "niah" and record["command"].startswith("longctx bench niah --model")
    cells = [row for row in record["results"] if row["metric"] == "exact match"]
    assert [row["n"] for row in cells] == [4, 1, 1, 1, 1]
    assert all(0 <= row["low"] <= row["value"] <= row["high"] <= 1 for row in cells)
    computed = [
        row["value"]
        for row in record["results"]
        if row["metric"] == "prompt tokens computed per question"
    ]
    assert len(computed) == 2 and max(computed) <= 128
    assert (out / "niah.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "niah.json").read_text(encoding="utf-8")) == record


def test_a_bad_option_ends_with_one_line(model: Path) -> None:
    with pytest.raises(SystemExit, match=r"depths=0,x must be numbers such as"):
        main(["bench", "niah", "--model", str(model), "--depths", "0,x"])
