"""A large document through a server of its own: every stage is told, and a restart changes nothing
that is answered."""

from pathlib import Path

import pytest

from longctx.bench.config import BenchConfig, UploadConfig
from longctx.bench.report import Parameter
from longctx.bench.served.upload import run
from longctx.config import CacheConfig, EngineConfig, ModelConfig
from longctx.engine_stats import STEP_PARTS


def number(row: dict[str, Parameter]) -> float:
    value = row["value"]
    assert isinstance(value, int | float)
    return value


def test_a_document_is_followed_from_the_upload_to_answers_after_a_restart(
    model: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    report = run(
        EngineConfig(
            model=ModelConfig(model=model, device="cpu", threads=1),
            cache=CacheConfig(kv_codec="raw", device_pool_gib=0.1, kv_dir=tmp_path),
        ),
        BenchConfig(seed=3),
        UploadConfig(upload_tokens=4096, upload_questions=5),
        say=said.append,
    )
    rows = [result.flat() for result in report.results]
    values = {row["metric"]: number(row) for row in rows}
    assert 3500 < float(rows[0]["document_tokens"] or 0) <= 4096
    stages = {row["stage"]: number(row) for row in rows if row["metric"] == "stage"}
    assert list(stages) == ["upload", "tokenize", "prefill", "store"]
    assert values["ingested"] == pytest.approx(sum(stages.values()), rel=1e-3)
    parts = {row["part"]: number(row) for row in rows if row["metric"].startswith("part of the p")}
    assert list(parts) == list(STEP_PARTS)
    assert parts["layers"] > 0  # in which recognized layers write their keys, too
    assert parts["attention"] == 0, "the only layer is the last, which ends with its keys"
    assert values["most memory"] > 0 and values["processors busy"] > 0
    asked = [row["cache"] for row in rows if row["metric"] == "first token, median"]
    assert asked == ["warm", "restored"]
    assert values["answers that the restart changed"] == 0
    assert not list(tmp_path.iterdir()), "its store was its own"
    report.draw(tmp_path / "upload.png")
    assert (tmp_path / "upload.png").stat().st_size > 0


@pytest.mark.parametrize("questions", [0, 7, 40])
def test_questions_are_divided_evenly_among_depths(questions: int) -> None:
    with pytest.raises(ValueError, match="upload_questions"):
        UploadConfig(upload_tokens=4096, upload_questions=questions)
