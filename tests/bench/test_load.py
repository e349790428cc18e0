"""Answers beside a document are measured on any model, and what is measured adds up."""

import json
from pathlib import Path

import pytest

from longctx.bench.scheduling.load import AtDepth, Together
from longctx.cli import main


def test_each_depth_tells_of_answers_the_chat_and_the_document(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--load-depths 0,300 --window-tokens 256 --answers 2 --chat-tokens 20 --threads 1"
    pool = "--device-pool-gib 0.1"
    main(
        [
            "bench",
            "load",
            "--model",
            str(model),
            "--out",
            str(tmp_path),
            *f"{options} {pool}".split(),
        ]
    )
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    found = {(row["metric"], row["depth_tokens"]): row for row in rows}
    for depth in (0, 300):
        for metric in ("inter_token_p99", "chat_first_token", "document_alone"):
            row = found[metric, depth]
            assert row["value"] > 0 and row["baseline_value"] > 0
        assert found["document_speed_kept", depth]["value"] > 0
        assert found["inter_token_p50", depth]["idle_ms"] > 0
    assert (tmp_path / "load.png").stat().st_size > 0


def test_the_speed_kept_is_that_in_the_time_which_the_answers_leave() -> None:
    """2,000 tokens take 4 s alone, and 2.5 ms each beside answers."""
    beside = Together(
        intervals=(0.1,),
        chat_seconds=1.0,
        alone_intervals=(0.1,),
        document_seconds_per_token=0.0025,
    )
    measured = AtDepth(
        depth=0,
        alone_chat_seconds=1.0,
        alone_document_seconds=4.0,
        window_tokens=2000,
        chunked=beside,
        unchunked=beside,
        unchunked_document_seconds=4.0,
        prediction_error=None,
    )
    assert measured.kept_speed == pytest.approx(0.8)
