"""A question costs its own tokens, at whatever length its document is."""

import sys
from pathlib import Path
from types import FrameType

import numpy as np
import pytest

from longctx.engine.batch import Batch
from longctx.request import RequestClass
from offload.units import GIB
from tests.support.recorded_engine import RecordedEngine, ask, build_engine, some_ids
from tests.support.tiny_models import write_model
from tests.support.tiny_tokenizer import write_tokenizer

SHORT, LONG, MILLION = 10_000, 200_016, 1_000_016  # alike beyond their last full block


def engine_that_has_read(folder: Path, *lengths: int) -> RecordedEngine:
    """Only its last layer is global, so that reading is linear in the document."""
    write_model(
        folder,
        "gemma3_text",
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=64,
        max_position_embeddings=1 << 20,
    )
    write_tokenizer(folder)
    engine = build_engine(folder, pool_gib=max(lengths) * 800 / GIB)
    random = np.random.default_rng(0)
    for length in lengths:
        token_ids = random.integers(5, 500, length).astype(np.int32)
        engine.open_document(f"{length}", token_ids)
        request = ask(f"{length}", f"{length}", max_tokens=0, request_class=RequestClass.INGEST)
        engine.finish(request)
    return engine


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> RecordedEngine:
    return engine_that_has_read(tmp_path_factory.mktemp("long"), SHORT, LONG)


def calls_before_the_first_step(engine: RecordedEngine, document: str, name: str) -> int:
    """Calls, of Python and of C, from the question's arrival to the batch that computes it."""
    question = ask(name, document, some_ids(20, 1), max_tokens=3)
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        engine.submit(question)
        scheduled = engine.scheduler.schedule()
        Batch.build(scheduled.chunks, device=engine.memory.device)
    finally:
        sys.setprofile(None)
    assert scheduled.num_tokens <= 20 + 64
    engine.abort(name)
    engine.finish()
    return calls


def test_a_question_does_no_work_that_grows_with_its_document(engine: RecordedEngine) -> None:
    assert_equal_work(engine, SHORT, LONG)


@pytest.mark.slow
def test_nor_with_a_document_of_a_million_tokens(tmp_path: Path) -> None:
    assert_equal_work(engine_that_has_read(tmp_path, SHORT, MILLION), SHORT, MILLION)


def assert_equal_work(engine: RecordedEngine, short: int, long: int) -> None:
    calls_before_the_first_step(engine, f"{short}", "first")  # whatever is done once
    calls_for_short = calls_before_the_first_step(engine, f"{short}", "short")
    calls_for_long = calls_before_the_first_step(engine, f"{long}", "long")
    assert abs(calls_for_long - calls_for_short) <= 5
    assert calls_for_short < 5000


def test_a_question_on_a_long_document_computes_only_itself(engine: RecordedEngine) -> None:
    before = engine.runner.computed_tokens
    (asked,) = engine.finish(ask("q", f"{LONG}", some_ids(20, 1), max_tokens=1))
    assert engine.runner.computed_tokens - before == 20 + LONG % 64
    assert asked.counts.cached_tokens == LONG - LONG % 64


def test_windows_of_a_long_document_are_as_few_as_of_a_short_one(engine: RecordedEngine) -> None:
    assert engine.memory.groups[1].window == 64
    assert engine.memory.packed[1].held == 2  # one page for each document
