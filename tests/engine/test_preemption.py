"""Who is preempted goes on where it was: what it has sealed, its answer too, waits in the tiers."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from compress.shape import BLOCK_TOKENS
from longctx.attention.registry import BACKENDS
from longctx.kv import offloading
from longctx.request import Request
from offload.store import KVStore
from tests.conftest import ModelFolders
from tests.support.recorded_engine import (
    Eager,
    RecordedEngine,
    ask,
    assert_equals_eager,
    engine_config,
    gib_of_blocks,
    some_ids,
)

ANSWERS = 6
ANSWER_TOKENS = 200
POOL_BLOCKS = 14  # of the 24 that all answers take
LAYERS = {"llama": 3, "gemma3_text": 4}


@pytest.fixture(autouse=True)
def reading_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else the machine does: reading is faster than computing, and is waited for."""
    monkeypatch.setattr(KVStore, "read_seconds", lambda store, sizes: 0.0)
    monkeypatch.setattr(offloading, "SPILL_SECONDS", 600.0)


def requests(**changes: object) -> list[Request]:
    plain = (
        ask(f"{number}", some_ids(20 + 11 * number, number), max_tokens=ANSWER_TOKENS)
        for number in range(ANSWERS)
    )
    return [replace(each, **changes) for each in plain]  # type: ignore[arg-type]


def engine_of(
    folder: Path,
    *,
    blocks: int = POOL_BLOCKS,
    layers: int = 3,
    codec: str = "raw",
    host_gib: float = 0.0,
    kv_dir: Path | None = None,
) -> RecordedEngine:
    config = engine_config(
        codec=codec, dtype="float32", pool_gib=gib_of_blocks(blocks, layers, codec=codec)
    )
    cache = replace(
        config.cache,
        host_pool_gib=host_gib,
        kv_dir=kv_dir,
        disk_cap_gib=1 if kv_dir else None,
        disk_free_gib=0,
    )
    return RecordedEngine(replace(config, cache=cache), folder)


def tokens_computed_again(engine: RecordedEngine, asked: list[Request]) -> int:
    answered = engine.finish(*asked)
    assert engine.preemptions > 0, "the pool is too large to show anything"
    return sum(
        each.counts.computed_tokens - each.counts.prompt_tokens - each.counts.completion_tokens + 1
        for each in answered
    )


@pytest.fixture(params=["host", "disk", "both"])
def tiers(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dict[str, object]]:
    host: dict[str, object] = {"host_gib": 0.02}
    disk: dict[str, object] = {"kv_dir": tmp_path}
    yield {"host": host, "disk": disk, "both": host | disk}[request.param]


@pytest.mark.parametrize("architecture", sorted(LAYERS))
def test_only_the_rows_after_the_last_sealed_block_are_computed_again(
    architecture: str, tiers: dict[str, object], model_folders: ModelFolders
) -> None:
    folder = model_folders(architecture)
    engine = engine_of(folder, layers=LAYERS[architecture], **tiers)  # type: ignore[arg-type]
    again = tokens_computed_again(engine, requests())
    assert again < BLOCK_TOKENS * engine.preemptions
    assert_equals_eager(engine, Eager(folder))
    engine.assert_idle()
    engine.close()


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3_text"])
def test_an_answer_goes_on_though_nothing_of_it_is_left_on_the_device(
    architecture: str, model_folders: ModelFolders
) -> None:
    folder = model_folders(architecture)
    engine = engine_of(folder, blocks=100, layers=4, host_gib=0.02)
    engine.submit(ask("long", some_ids(300, 9), max_tokens=250))
    for length in (130, 190, 250):
        while len(engine.answered["long"].answer) < length - 20:
            engine.take_step()
        engine.scheduler.preempt(engine.scheduler.running[0])
        engine.clear(["device"])
    engine.finish()
    usage = engine.answered["long"].counts
    assert usage.computed_tokens - 300 - 250 + 1 < 3 * BLOCK_TOKENS
    assert_equals_eager(engine, Eager(folder))
    engine.assert_idle()


def test_without_tiers_sealed_blocks_are_computed_again(llama: Path) -> None:
    engine = engine_of(llama)
    assert tokens_computed_again(engine, requests()) > BLOCK_TOKENS * engine.preemptions
    engine.assert_idle()


@pytest.mark.skipif("cpu" not in BACKENDS, reason="torch's kernels depend on the rows beside")
@pytest.mark.parametrize("codec", ["raw", "int4"])
def test_no_bit_of_an_answer_depends_on_it(codec: str, llama: Path) -> None:
    alone = engine_of(llama, blocks=400, codec=codec)
    crowded = engine_of(llama, codec=codec, host_gib=0.02)
    for request in requests():
        alone.finish(request)
    crowded.finish(*requests())
    assert crowded.preemptions > 0
    for name, rows in alone.logits.items():
        assert all(torch.equal(row, crowded.logits[name][at]) for at, row in rows.items())


def test_a_host_tier_that_is_full_costs_time_and_no_answer(llama: Path) -> None:
    engine = engine_of(llama, host_gib=gib_of_blocks(3))
    assert tokens_computed_again(engine, requests()) > 0
    assert_equals_eager(engine, Eager(llama))
    engine.assert_idle()


@pytest.mark.parametrize("host_gib", [0.0, 0.02])
def test_what_is_kept_in_memory_is_not_spilled_to_disk(
    host_gib: float, llama: Path, tmp_path: Path
) -> None:
    engine = engine_of(llama, host_gib=host_gib, kv_dir=tmp_path)
    again = tokens_computed_again(engine, requests(in_memory=True))
    store = engine.stats().store
    assert store is not None and store.tiers["disk"].blocks == 0
    assert not list(tmp_path.glob("*.kv"))
    if host_gib:
        assert store.tiers["host"].blocks > 0 and again < BLOCK_TOKENS * engine.preemptions
    engine.assert_idle()
    engine.close()
