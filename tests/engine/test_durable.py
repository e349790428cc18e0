"""Documents that outlive the engine: restored from disk, resumed, forgotten everywhere."""

from pathlib import Path

import numpy as np
import pytest

from compress.int4 import Int4
from compress.int8 import Int8
from longctx.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from longctx.llm import LLM
from longctx.request import Request, SamplingParams, Segment

GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
TEXT = "The lighthouse keeper counts nine ships before breakfast and writes them down. " * 60


def config(
    folder: Path, *, codec: str = "raw", pool_gib: float = 0.05, compress: bool = False
) -> EngineConfig:
    return EngineConfig(
        model=ModelConfig(threads=1),
        cache=CacheConfig(
            kv_codec=codec,
            force_codec=True,
            kv_dir=folder,
            device_pool_gib=pool_gib,
            disk_cap_gib=1,
            disk_compress=compress,
        ),
        scheduler=SchedulerConfig(max_sequences=8),
    )


@pytest.mark.parametrize("codec", ["raw", "bf16", "int8", "int4"])
def test_a_document_is_restored_after_the_end_of_the_engine(tmp_path: Path, codec: str) -> None:
    first = LLM(config=config(tmp_path, codec=codec))
    document = first.document_from_text(TEXT)
    cold = document.ask("How many ships?", GREEDY)
    first.close()

    second = LLM(config=config(tmp_path, codec=codec))
    document = second.document_from_text(TEXT)
    assert document.usage.computed_tokens == 0
    restored = document.ask("How many ships?", GREEDY)
    second.close()

    assert restored.token_ids == cold.token_ids
    assert restored.usage.computed_tokens < 128
    assert restored.usage.cached_tokens >= document.tokens - 64


@pytest.mark.parametrize("codec", [Int8, Int4])
def test_pages_of_another_version_of_a_codec_are_computed_again(
    tmp_path: Path, codec: type[Int8 | Int4], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an older longctx wrote has other bytes at other places."""
    with monkeypatch.context() as older:
        older.setattr(codec, "version", codec.version - 1)
        with LLM(config=config(tmp_path, codec=codec.name)) as first:
            first.document_from_text(TEXT)
    with LLM(config=config(tmp_path, codec=codec.name)) as second:
        document = second.document_from_text(TEXT)
        assert document.usage.computed_tokens > document.tokens - 64
        assert document.ask("How many ships?", GREEDY).usage.computed_tokens < 128


def test_a_document_larger_than_others_leave_room_for_comes_back_when_it_is_asked(
    tmp_path: Path,
) -> None:
    llm = LLM(config=config(tmp_path, pool_gib=0.01))
    documents = [llm.document_from_text(f"{number} {TEXT}") for number in range(6)]
    cold = [document.ask("How many ships?", GREEDY) for document in documents]
    again = [document.ask("How many ships?", GREEDY) for document in documents]
    assert llm.engine.stats().tiers["disk"].hits > 0
    llm.close()
    assert [answer.token_ids for answer in again] == [answer.token_ids for answer in cold]
    assert all(answer.usage.computed_tokens < 128 for answer in again)


def test_compressed_blocks_take_less_room_and_give_the_same_answers(tmp_path: Path) -> None:
    sizes, answers = [], []
    for compress in (False, True):
        folder = tmp_path / f"{compress}"
        for _ in range(2):  # computes, then restores
            llm = LLM(config=config(folder, codec="bf16", compress=compress))
            answers.append(llm.document_from_text(TEXT).ask("How many ships?", GREEDY).token_ids)
            llm.close()
        sizes.append(sum(file.stat().st_size for file in folder.glob("*.kv")))
    assert sizes[1] < 0.85 * sizes[0]
    assert len(set(answers)) == 1


def test_a_closed_document_leaves_nothing_on_disk(tmp_path: Path) -> None:
    llm = LLM(config=config(tmp_path))
    llm.document_from_text(TEXT).close()
    llm.close()
    assert not list(tmp_path.glob("*.kv"))


def test_a_document_that_is_closed_before_its_turn_leaves_nothing_on_disk(tmp_path: Path) -> None:
    first = LLM(config=config(tmp_path))
    token_ids = np.array(first.engine.tokenizer.encode(TEXT), dtype=np.int32)
    keep = Request(
        request_id="read",
        segments=(Segment(document_id="d"),),
        sampling=SamplingParams(max_tokens=0),
    )
    first.engine.open_document("d", token_ids, keep=keep)
    first.engine.submit(keep)
    while first.engine.has_work:
        first.engine.step()
    first.close()
    assert list(tmp_path.glob("*.kv"))

    second = LLM(config=config(tmp_path))
    second.engine.open_document("d", token_ids, keep=keep)
    assert second.engine.durable_changes()["d"] == len(token_ids)
    second.engine.close_document("d")
    second.close()
    assert not list(tmp_path.glob("*.kv"))
