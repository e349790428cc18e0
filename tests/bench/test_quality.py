"""The quality benchmark gives the gate's figures for every codec."""

import json
from pathlib import Path

import pytest

from compress.codec import CODECS
from longctx.cli import main


def test_every_codec_is_compared_with_raw(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.md"
    text.write_text("The harbour was quiet. A boat came in with the tide. " * 40, encoding="utf-8")
    options = "--threads 1 --text-tokens 150 --own-tokens 20 --out"
    words = ["--model", str(model), "--text-file", str(text), *options.split(), str(tmp_path)]
    main(["bench", "quality", *words])
    record = json.loads(capsys.readouterr().out.rstrip("\n").split("\n")[-1])
    rows = [row for row in record["results"] if row["metric"] == "KL"]
    others = [codec for codec in CODECS if codec != "raw"]
    assert [(row["codec"], row["part"]) for row in rows] == [
        (codec, part) for codec in others for part in ("text", "own")
    ]
    found = {row["codec"]: row["value"] for row in rows if row["part"] == "text"}
    assert 0 < found["bf16"] < found["int8"] < found["int4"]
    verdicts = {
        row["codec"]: row for row in record["results"] if row["metric"] == "passes the gate"
    }
    assert set(verdicts) == set(others)
    assert all(row["why"] for row in verdicts.values())
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("weights", "forced"), [("int8", []), ("int4", ["--force-weights"])])
def test_rounded_weights_are_compared_with_those_of_the_checkpoint(
    weights: str, forced: list[str], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("longctx.model.packed_linear", exc_type=ImportError)
    text = tmp_path / "text.md"
    text.write_text("The harbour was quiet. A boat came in with the tide. " * 40, encoding="utf-8")
    options = "--threads 1 --text-tokens 150 --own-tokens 20 --kv-codec int8 --weights"
    given = ["--model", str(model), "--text-file", str(text), *options.split(), weights, *forced]
    main(["bench", "quality", *given])
    printed = capsys.readouterr().out.rstrip("\n").split("\n")
    rows = [row for row in json.loads(printed[-1])["results"] if row["metric"] == "KL"]
    assert [(row.get("codec"), row.get("weights"), row["part"]) for row in rows] == [
        ("int8", None, "text"),
        ("int8", None, "own"),
        (None, weights, "text"),
        (None, weights, "own"),
    ]
    assert all(row["value"] > 1e-7 for row in rows if "weights" in row)
    assert any(f"weights {weights}" in line for line in printed)


def test_raw_cannot_be_compared_with_itself(model: Path) -> None:
    with pytest.raises(SystemExit, match=r"kv_codec 'raw' cannot be compared .* bf16, int8, int4"):
        main(["bench", "quality", "--model", str(model), "--kv-codec", "raw"])
