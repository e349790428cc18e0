"""The benchmark of modules measures what it says, on a model too small to be interesting."""

import json
from pathlib import Path
from typing import Any

import pytest

from longctx.bench.config import ModulesConfig
from longctx.bench.module_text import cut_text
from longctx.cli import main

LEVELS = ["link:16", "modular"]


def test_every_part_is_measured_at_every_level(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (
        "--modules 3 --module-tokens 150 --fact-tokens 256 --fact-questions 5 "
        "--rounds 2 --device-pool-gib 0.1 --kv-codec raw --threads 1"
    )
    main(["bench", "modules", "--model", str(model), "--out", str(tmp_path), *options.split()])
    record = json.loads(capsys.readouterr().out.rstrip("\n").split("\n")[-1])
    found: dict[str, list[tuple[str, float]]] = {}
    for row in record["results"]:
        found.setdefault(row["metric"], []).append((row["level"], row["value"]))
    for metric in ("KL", "same likeliest token"):
        assert [level for level, _ in found[metric]] == [each for each in LEVELS for _ in range(2)]
    assert [level for level, _ in found["passes the gate"]] == LEVELS
    for task in ("needle", "multi-key"):
        assert [level for level, _ in found[task]] == ["exact", *LEVELS]
        assert all(0 <= share <= 1 for _, share in found[task])
    assert {level for level, _ in found["first token, from memory"]} == {"exact", *LEVELS}
    assert [level for level, _ in found["first token, from disk"]] == LEVELS
    for row in record["results"]:
        if row["metric"].startswith("first token"):
            assert row["baseline"] == "computing it" and row["rounds"] == 2
            assert row["ratio"] == pytest.approx(row["baseline_value"] / row["value"], rel=1e-3)
    assert (tmp_path / "modules.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("part", ["quality", "retrieval"])
def test_a_part_is_measured_alone(
    part: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = f"--parts {part} --levels modular --modules 2 --fact-tokens 256 --fact-questions 5"
    options += " --device-pool-gib 0.1 --kv-codec raw --threads 1"
    main(["bench", "modules", "--model", str(model), "--out", str(tmp_path), *options.split()])
    record = json.loads(capsys.readouterr().out.rstrip("\n").split("\n")[-1])
    metrics = {row["metric"] for row in record["results"]}
    assert metrics == (
        {"needle", "multi-key"}
        if part == "retrieval"
        else {"KL", "same likeliest token", "passes the gate"}
    )
    assert (tmp_path / "modules.png").read_bytes().startswith(b"\x89PNG")


def test_a_text_is_cut_between_paragraphs() -> None:
    text = "\n\n".join(f"Paragraph {number}. It has two sentences." for number in range(40))
    pieces = cut_text(text, 6)
    assert len(pieces) == 6 and "".join(pieces) == text
    assert all(piece.endswith("\n\n") for piece in pieces[:-1])
    assert max(map(len, pieces)) < 2 * min(map(len, pieces))
    assert cut_text("no paragraph", 6) == ["no paragraph"]
    assert cut_text("One line. Two lines. Three. Four.", 2) == [
        "One line. Two lines. ",
        "Three. Four.",
    ]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"parts": "speed,taste"}, "has taste; choose from"),
        ({"modules": 0}, "modules=0 must be at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        ModulesConfig(**options)
