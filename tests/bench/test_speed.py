"""The two benchmarks of speed measure what they say, on models too small to be interesting."""

import json
from pathlib import Path

import pytest

from longctx.bench.document import count_calls
from longctx.cli import main


def results(capsys: pytest.CaptureFixture[str]) -> dict[str, list[dict[str, float]]]:
    by_metric: dict[str, list[dict[str, float]]] = {}
    record = json.loads(capsys.readouterr().out.rstrip("\n").split("\n")[-1])
    for row in record["results"]:
        by_metric.setdefault(row["metric"], []).append(row)
    return by_metric


def test_decode_is_measured_against_transformers_and_says_the_same(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--contexts 20,300 --new-tokens 4 --rounds 2 --threads 1 --dtype float32"
    main(["bench", "decode", "--model", str(model), "--out", str(tmp_path), *options.split()])
    found = results(capsys)
    assert [row["context_tokens"] for row in found["decode"]] == [20, 300]
    for row in (*found["decode"], *found["prefill"]):
        assert row["ratio"] == pytest.approx(row["baseline_value"] / row["value"], rel=1e-3)
        assert row["baseline"] == "transformers.generate" and row["rounds"] == 2
    assert [row["value"] for row in found["same tokens"]] == [1.0, 1.0]
    assert (tmp_path / "decode.png").read_bytes().startswith(b"\x89PNG")


def test_a_warm_question_computes_no_document(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--document-lengths 512,1024 --rounds 2 --threads 1"
    main(["bench", "document", "--model", str(model), "--out", str(tmp_path), *options.split()])
    found = results(capsys)
    assert len(found["warm first token"]) == len(found["cold first token"]) == 2
    for row in found["computed tokens of a warm question"]:
        assert row["value"] <= 128
    assert (tmp_path / "document.png").read_bytes().startswith(b"\x89PNG")


def test_calls_are_counted_once_each() -> None:
    numbers: list[int] = []

    def work() -> None:
        for number in range(5):
            numbers.append(number)

    few = count_calls(work)
    assert len(numbers) == 5
    assert few - count_calls(lambda: None) == 5
