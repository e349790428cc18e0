"""The examples work against a server as they are."""

import runpy
from pathlib import Path

import pytest

from tests.api.live_server import LiveServer

TRAVEL = Path(__file__).parents[2] / "examples" / "travel"


def test_the_travel_plan_is_asked_at_every_level(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forced = {"force_level": True}  # a random model stands no level
    with LiveServer(model_folder, tmp_path, cache=forced) as server:
        runpy.run_path(str(TRAVEL / "ask.py"))["main"](server.url)
    out = capsys.readouterr().out
    assert "schema travel: ready" in out
    levels = [line.split()[0] for line in out.splitlines() if line.startswith("  ")]
    assert levels == ["modular", "link:16", "exact"] * 3
