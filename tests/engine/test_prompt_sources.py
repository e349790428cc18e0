"""Each token of a prompt has one source: computed, or the tier that had it when it was asked."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from longctx.request import SOURCES, TokenSource, Usage
from tests.conftest import ModelFolders
from tests.support.recorded_engine import RecordedEngine, ask, engine_config, some_ids

PROMPT = some_ids(1200, 1)  # long enough to be stored at once
CACHED = 1152  # in full blocks


@contextmanager
def opened(folder: Path, kv_dir: Path) -> Iterator[RecordedEngine]:
    config = engine_config()
    cache = replace(
        config.cache, kv_dir=kv_dir, host_pool_gib=0.05, disk_cap_gib=1, disk_free_gib=0
    )
    engine = RecordedEngine(replace(config, cache=cache), folder)
    yield engine
    while engine.has_transfers:
        engine.step()
    engine.close(flush_seconds=60)


def sources(**tokens: int) -> dict[TokenSource, int]:
    return {source: tokens.get(source, 0) for source in SOURCES}


def answered(engine: RecordedEngine, name: str, *pieces: tuple[int, ...] | str) -> Usage:
    (answer,) = engine.finish(ask(name, *pieces))
    while engine.has_transfers:
        engine.step()
    return answer.counts


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "mistral"])
def test_a_prompt_is_computed_once_and_then_found_where_it_was(
    architecture: str, model_folders: ModelFolders, tmp_path: Path
) -> None:
    folder = model_folders(architecture)
    with opened(folder, tmp_path) as engine:
        told = [answered(engine, "cold", PROMPT), answered(engine, "warm", PROMPT)]
        engine.clear(["device"])
        told.append(answered(engine, "from host", PROMPT))
        total = engine.stats().prompt_tokens_by_source
    with opened(folder, tmp_path) as engine:
        told += [answered(engine, "from disk", PROMPT), answered(engine, "on device", PROMPT)]
    found = {"device": CACHED, "computed": 48}
    assert [usage.tokens_by_source for usage in told] == [
        sources(computed=1200),
        sources(**found),
        sources(host=CACHED, computed=48),
        sources(disk=CACHED, computed=48),
        sources(**found),
    ]
    assert total == sources(computed=1200 + 48 + 48, device=CACHED, host=CACHED)


def test_a_document_that_is_stored_already_is_counted_where_it_lies(
    llama: Path, tmp_path: Path
) -> None:
    text = np.array(some_ids(1000, 2), dtype=np.int32)
    with opened(llama, tmp_path) as engine:
        engine.open_document("d", text)
        (read,) = engine.finish(ask("read", "d", max_tokens=0))
        assert read.counts.tokens_by_source == sources(computed=1000)
    with opened(llama, tmp_path) as engine:
        engine.open_document("d", text)
        (again,) = engine.finish(ask("read", "d", max_tokens=0))
        assert again.counts.tokens_by_source == sources(disk=960, none=40)
        question = answered(engine, "question", "d", some_ids(30, 3))
        assert question.tokens_by_source == sources(disk=960, computed=70)


def test_what_was_not_needed_any_more_is_counted_apart(llama: Path, tmp_path: Path) -> None:
    with opened(llama, tmp_path) as engine:
        engine.submit(ask("never ran", PROMPT))
        engine.abort("never ran")
        engine.submit(ask("left early", PROMPT))
        while not engine.answered["left early"].progress:
            engine.take_step()
        engine.abort("left early")
        engine.take_step()
        computed = engine.runner.computed_tokens
        assert 0 < computed < 1200
        never, left = (engine.answered[name].counts for name in ("never ran", "left early"))
        assert never.tokens_by_source == sources(none=1200)
        assert left.tokens_by_source == sources(computed=computed, none=1200 - computed)


def test_a_prompt_that_is_computed_again_after_a_preemption_is_counted_once(
    llama: Path, tmp_path: Path
) -> None:
    with opened(llama, tmp_path) as engine:
        prompt = some_ids(500, 4)
        engine.submit(ask("preempted", prompt))
        engine.take_step()
        (sequence,) = engine.scheduler.running
        engine.scheduler.preempt(sequence)
        engine.clear(["device"])
        engine.finish()
        usage = engine.answered["preempted"].counts
        assert usage.tokens_by_source == sources(computed=500)
