"""A report ends in one line of JSON that names its machine; with a folder it leaves files."""

import json
from pathlib import Path

import pytest

from longctx.bench.report import Report, Result, publish


def faster(path: Path) -> None:
    path.write_bytes(b"a picture")


REPORT = Report(
    results=(
        Result(
            metric="decode",
            value=20.0,
            unit="ms/token",
            parameters={"context_tokens": 100},
            baseline="something slower",
            baseline_value=30.0,
        ),
        Result(metric="tokens", value=7, unit="tokens"),
    ),
    tables=("a table",),
    draw=faster,
)


def test_the_last_line_is_compact_json(capsys: pytest.CaptureFixture[str]) -> None:
    publish(REPORT, bench="decode", command="longctx bench decode", out=None)
    *table, last = capsys.readouterr().out.rstrip("\n").split("\n")
    record = json.loads(last)
    assert table == ["a table"]
    assert list(record) == ["bench", "version", "commit", "machine", "command", "results"]
    assert record["bench"] == "decode"
    assert "cores" in record["machine"] and "torch" in record["machine"]
    assert last == json.dumps(record, separators=(",", ":"))


def test_results_are_flat_and_compared_ones_carry_the_ratio() -> None:
    compared, plain = (result.flat() for result in REPORT.results)
    assert compared == {
        "metric": "decode",
        "value": 20.0,
        "unit": "ms/token",
        "context_tokens": 100,
        "baseline": "something slower",
        "baseline_value": 30.0,
        "ratio": 1.5,
    }
    assert plain == {"metric": "tokens", "value": 7, "unit": "tokens"}


def test_a_folder_gets_the_record_and_the_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made" / "here"
    publish(REPORT, bench="decode", command="longctx bench decode", out=out)
    last = capsys.readouterr().out.rstrip("\n").split("\n")[-1]
    assert json.loads((out / "decode.json").read_text(encoding="utf-8")) == json.loads(last)
    assert (out / "decode.png").read_bytes() == b"a picture"
