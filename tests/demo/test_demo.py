"""The demo runs from start to end on any model, and says so when there is none."""

import subprocess
import sys
from pathlib import Path

import pytest

from longctx.demo.tour import main


def test_without_a_model_it_ends_with_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"there is no model in .*; install longctx with its"):
        main(["--model", str(tmp_path)])


@pytest.mark.slow
def test_it_shows_everything_and_stops_cleanly(model: Path, tmp_path: Path) -> None:
    words = ["--model", str(model), "--out", str(tmp_path), "--document-tokens", "4096"]
    demo = subprocess.run(
        [sys.executable, "-m", "longctx.demo", *words], capture_output=True, text=True, timeout=300
    )
    assert demo.returncode == 0, demo.stderr
    # A random model finds nothing, and the demo says so
    assert demo.stdout.count("as expected") + demo.stdout.count("wrong") == 7
    rows = [line.split() for line in demo.stdout.splitlines()]
    (cold,), (warm,), (restored,) = (
        [row for row in rows if row[:1] == [label]] for label in ("cold", "warm", "restored")
    )
    assert warm[3] == restored[3] != cold[3]  # computed
    assert warm[4] == restored[5] and cold[5] == warm[5] == restored[4] == "0"  # memory, disk
    assert demo.stdout.count("exit code 0") == 2
    assert "6 texts," in demo.stdout and "port, archive, museum" in demo.stdout
    assert (tmp_path / "niah.png").read_bytes().startswith(b"\x89PNG")
