"""What some ranks have stored, any other number of them restores."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from longctx.errors import PeerLost
from longctx.ring.virtual import VirtualRanks
from tests.conftest import ModelFolders
from tests.ring.side_by_side import runner_of
from tests.support.recorded_engine import RecordedEngine, ask, engine_config, some_ids

DOCUMENT = np.array(some_ids(1850, 1), dtype=np.int32)
QUESTION = some_ids(9, 2)


def durable_engine(folder: Path, kv_dir: Path, ranks: int, codec: str) -> RecordedEngine:
    config = engine_config(codec=codec, max_batch_tokens=512)
    cache = replace(config.cache, kv_dir=kv_dir, disk_cap_gib=1.0, disk_free_gib=0.0)
    engine = RecordedEngine(
        replace(config, cache=cache), folder, VirtualRanks(ranks) if ranks > 1 else None
    )
    engine.open_document("d", DOCUMENT)
    return engine


@pytest.mark.parametrize("codec", ["raw", "int8"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_what_two_ranks_wrote_one_three_and_four_restore(
    tmp_path: Path, model_folders: ModelFolders, family: str, codec: str
) -> None:
    folder = model_folders(family)
    writer = durable_engine(folder, tmp_path, 2, codec)
    writer.finish(ask("read", "d", max_tokens=0))
    assert writer.durable_changes() == {"d": len(DOCUMENT)}
    (written,) = writer.finish(ask("one", "d", QUESTION))
    expected = writer.logits["one", 0][len(DOCUMENT) + len(QUESTION)]
    writer.close(flush_seconds=10.0)
    for ranks in (2, 1, 3, 4):
        reader = durable_engine(folder, tmp_path, ranks, codec)
        (answered,) = reader.finish(ask("one", "d", QUESTION))
        assert answered.counts.cached_tokens == len(DOCUMENT) // 64 * 64
        assert reader.runner.computed_tokens < 100
        assert answered.answer == written.answer
        row = reader.logits["one", 0][len(DOCUMENT) + len(QUESTION)]
        torch.testing.assert_close(row, expected, atol=1e-3, rtol=0)
        reader.close()


def test_each_rank_holds_its_share_of_a_document(tmp_path: Path, llama: Path) -> None:
    engine = durable_engine(llama, tmp_path, 4, "raw")
    engine.finish(ask("read", "d", max_tokens=0))
    ranks = runner_of(engine).ranks
    assert isinstance(ranks, VirtualRanks)
    memories = [engine.memory, *(member.rank.memory for member in ranks.followers)]
    # A page that was never written is all zeros.
    filled = [
        int((m.packed_pages(0)[: m.packed[0].staging.start] != 0).any(dim=1).sum())
        for m in memories
    ]
    assert sum(filled) == len(DOCUMENT) // 64
    assert all(abs(pages - sum(filled) / 4) <= 16 for pages in filled)
    engine.close()


def test_a_step_that_cannot_be_sent_is_a_lost_rank(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = durable_engine(llama, tmp_path, 2, "raw")

    def surprise(steps: object) -> None:
        raise ValueError("too large")

    monkeypatch.setattr(runner_of(engine).ranks, "start", surprise)
    with pytest.raises(PeerLost, match="ValueError: too large"):
        engine.finish(ask("read", "d", max_tokens=0))
    engine.close()
