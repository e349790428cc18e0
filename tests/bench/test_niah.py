"""The needle benchmark counts strictly, knows its uncertainty, and runs through the real engine."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longctx.bench.config import LevelsConfig, NiahConfig, VariantsConfig
from longctx.bench.retrieval.grid import Grid, Reading
from longctx.bench.retrieval.niah_report import results, tables
from longctx.bench.retrieval.variants import Variant, difference, told_logprobs
from longctx.bench.timing import Stopwatch, TimedAnswer
from longctx.cli import main
from longctx.errors import LongctxError
from longctx.needles.scores import matches, mcnemar, wilson


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
    lines = [json.loads(line) for line in (out / "niah.jsonl").read_text().splitlines()]
    begins = {line["depth"]: line["begin_token"] for line in lines if "wanted_token" in line}
    assert begins[0.0] == 0 and 900 < begins[100.0] < 1024
    (missed,) = {
        row["value"] for row in record["results"] if row["metric"].startswith("farthest needle")
    }
    assert missed == 0  # at both ends
    assert (out / "niah.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "niah.json").read_text(encoding="utf-8")) == record


def test_a_bad_option_ends_with_one_line(model: Path) -> None:
    with pytest.raises(SystemExit, match=r"depths=0,x must be numbers such as"):
        main(["bench", "niah", "--model", str(model), "--depths", "0,x"])


@pytest.mark.parametrize(
    ("lost", "gained", "p"),
    [(0, 0, 1.0), (5, 0, 0.0625), (0, 5, 0.0625), (3, 3, 1.0), (9, 1, 0.021484), (400, 0, 0.0)],
)
def test_mcnemar_is_exact(lost: int, gained: int, p: float) -> None:
    assert mcnemar(lost, gained) == pytest.approx(p, abs=1e-6)


def answer(right: bool, given: str, likeliest: list[dict[int, float]]) -> dict[str, Any]:
    """A record whose places have these probabilities, the likeliest token first."""
    logs = [[(token, math.log(p)) for token, p in place.items()] for place in likeliest]
    depth = {"depth": 0.0, "begin_token": 0, "wanted_token": 0}
    return {**depth, "right": right, "given": given, "likeliest": told_logprobs(logs)}


def grid(*answers: dict[str, Any]) -> Grid:
    reading = Reading(cached_tokens=[1], computed_tokens=[1], first_token_seconds=[1.0])
    return Grid({(512, 0, 0, n): each for n, each in enumerate(answers)}, {512: reading})


def test_a_difference_pairs_the_same_questions_and_ends_an_answer_where_it_turns() -> None:
    sure, half = {1: 0.9, 2: 0.1}, {1: 0.5, 2: 0.25}
    turned = {2: 0.5, 1: 0.4}
    base = grid(answer(True, "a", [sure]), answer(True, "b", [half, sure, sure]))
    other = grid(answer(True, "a", [sure]), answer(False, "c", [half, turned, sure]))
    found = difference(base.answers, other.answers)
    assert (found.asked, found.lost, found.gained, found.changed) == (2, 1, 0, 1)
    assert found.places == 3 and found.flips == pytest.approx(1 / 3)
    turning = 0.9 * math.log(0.9 / 0.4) + 0.1 * math.log(0.1 / 0.5)
    assert found.kl == pytest.approx(turning / 3, abs=1e-4)  # the rest of `turned` is no mass lost
    assert found.share == -0.5 and found.p == 1.0


@given(st.integers(0, 10_000))
def test_the_divergence_of_what_both_name_is_no_more_than_the_whole(seed: int) -> None:
    torch.manual_seed(seed)
    first = torch.randn(40) * 2
    second = first + torch.randn(40) * 0.5
    logs = [each.double().log_softmax(-1) for each in (first, second)]
    whole = float((logs[0].exp() * (logs[0] - logs[1])).sum())
    grids = []
    for each in logs:
        top = each.topk(8)
        place = dict(zip(top.indices.tolist(), top.values.exp().tolist(), strict=True))
        grids.append({0: answer(True, "a", [place])})
    assert -1e-9 <= difference(*grids).kl <= whole + 1e-5


def test_cells_that_the_exact_model_fails_are_marked() -> None:
    niah = NiahConfig(lengths="512", depths="0", questions=3)
    place = [{1: 0.9, 2: 0.1}]
    wrong, right = answer(False, "a", place), answer(True, "b", place)
    for base, tells in ((grid(wrong, wrong, right), False), (grid(right, right, wrong), True)):
        grids = {Variant("raw", "warm"): base, Variant("int8", "warm"): grid(right, right, right)}
        rows = [row.flat() for row in results(grids, niah, {})]
        cells = [row for row in rows if row["metric"] == "exact match" and "depth_percent" in row]
        assert [row["discriminates"] for row in cells] == [tells, tells]
        assert ("no loss would show" in str(next(tables(grids, niah, "")).caption)) is not tells


GRID = "--lengths 512,700 --depths 0,100 --questions 1 --seeds 2 --threads 1"


def test_codecs_are_compared_cold_warm_and_after_a_restart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*GRID.split(), "--codecs", "int8", "--caches", "restored,cold,warm"]
    main(["bench", "niah", *options, "--out", str(tmp_path)])
    record = json.loads(capsys.readouterr().out.rstrip("\n").split("\n")[-1])
    rows = record["results"]
    totals = [
        (row["kv_codec"], row["cache"], row["n"], row["value"])
        for row in rows
        if row["metric"] == "exact match" and "length_tokens" not in row
    ]
    assert totals == [
        (codec, cache, 8, 1.0)
        for codec in ("raw", "int8")
        for cache in ("cold", "warm", "restored")
    ]
    differences = {
        (row["kv_codec"], row["cache"]): row["value"]
        for row in rows
        if row["metric"] == "KL along answers, at least"
    }
    assert len(differences) == 5  # all but raw cold, which they are compared with
    # What comes back from the disk is what was computed, to the last bit
    for codec in ("raw", "int8"):
        assert len({differences.get((codec, cache)) for cache in ("warm", "restored")}) == 1
    assert differences["raw", "warm"] < 1e-5 and differences["int8", "warm"] < 1e-2
    found = {
        (row["cache"], row["length_tokens"]): row["value"]
        for row in rows
        if row["metric"] == "cached tokens per question" and row["kv_codec"] == "int8"
    }
    assert found["cold", 700] == 0 and found["warm", 700] == found["restored", 700] >= 576
    assert (tmp_path / "niah.png").read_bytes().startswith(b"\x89PNG")


def test_levels_are_compared_with_exact_cold_warm_and_after_a_restart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--lengths 2048 --depths 0,100 --questions 2 --threads 1 --kv-codec raw"
    levels = "--levels link:16,modular --caches cold,warm,restored"
    main(["bench", "niah", *options.split(), *levels.split(), "--out", str(tmp_path)])
    printed = capsys.readouterr()
    rows = json.loads(printed.out.rstrip("\n").split("\n")[-1])["results"]
    assert "Where raw cold exact finds more" in printed.out + printed.err
    totals = [
        (row["cache"], row["level"], row["n"])
        for row in rows
        if row["metric"] == "exact match" and "length_tokens" not in row
    ]
    names = [
        (cache, level)
        for cache in ("cold", "warm", "restored")
        for level in ("exact", "link:16", "modular")
    ]
    assert totals == [(*name, 4) for name in names]
    kl = {
        (row["cache"], row["level"]): row["value"]
        for row in rows
        if row["metric"] == "KL along answers, at least"
    }
    assert list(kl) == names[1:]  # all but the first, which they are compared with
    for level in ("link:16", "modular"):  # modules do not know each other, wherever they come from
        assert kl["warm", level] > 10 * kl["warm", "exact"]
        assert kl["warm", level] == kl["restored", level]
        assert kl["cold", level] == pytest.approx(kl["warm", level], rel=0.01)
    tokens = {
        (row["cache"], row["level"], row["metric"]): row["value"]
        for row in rows
        if row["unit"] == "tokens"
    }
    computed = "prompt tokens computed per question"
    for level in ("exact", "link:16", "modular"):
        assert tokens["warm", level, computed] <= 64 * 4 + 100  # blocks end with each module
        assert tokens["restored", level, computed] <= 64 * 4 + 100
        assert tokens["restored", level, "cached tokens per document"] > 1600


def test_an_interrupted_grid_goes_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", "niah", "--model", str(model), *GRID.split(), "--answer-tokens", "3"]
    words += ["--caches", "warm,restored", "--out", str(tmp_path)]
    asked: list[int] = []
    ask = Stopwatch.ask

    def failing(limit: int) -> None:
        def until(self: Stopwatch, *arguments: Any, **named: Any) -> TimedAnswer:
            if len(asked) == limit:
                raise LongctxError("the power is gone")
            asked.append(1)
            return ask(self, *arguments, **named)

        monkeypatch.setattr(Stopwatch, "ask", until)

    failing(11)  # in the engine after the restart, whose store is gone then
    with pytest.raises(SystemExit, match="the power is gone"):
        main(words)
    failing(1000)
    main(words)
    assert len(asked) == 16  # 2 lengths, 2 depths, 2 seeds, 2 caches, each once
    record = json.loads(capsys.readouterr().out.rstrip("\n").split("\n")[-1])
    matched = [row for row in record["results"] if row["metric"] == "exact match"]
    assert [row["n"] for row in matched if "length_tokens" not in row] == [8, 8]


def test_a_codec_or_cache_that_there_is_not_is_named() -> None:
    with pytest.raises(ValueError, match="codecs=int5 is unknown; choose from raw, bf16"):
        VariantsConfig(codecs="int8,int5")
    with pytest.raises(ValueError, match="levels=exact has exact, which all are compared with"):
        LevelsConfig(levels="exact")
    for name in ("link", "link:0"):
        with pytest.raises(ValueError, match=f"levels is '{name}'; choose exact, modular, or link"):
            LevelsConfig(levels=name)
    with pytest.raises(ValueError, match="caches=tepid is unknown; choose from cold, warm"):
        VariantsConfig(caches="warm,tepid")
