"""Thousands of documents through a small device and a small disk: bounded, and never wrong.

pytest -m slow -s tests/engine/test_soak.py
"""

import os
import random
from contextlib import suppress
from pathlib import Path

import pytest

from longctx.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from longctx.llm import LLM, Document
from longctx.request import SamplingParams

UPLOADS = 1000  # and a question for each
CLOSED = 0.1  # share of the uploads after which a document is closed again
TOKENS = 1500
GREEDY = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
RSS_GROWTH_BYTES = 64 << 20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def text(number: int) -> str:
    words = random.Random(number)
    return " ".join(str(words.randrange(10_000)) for _ in range(TOKENS // 6))


@pytest.mark.slow
def stored_bytes(folder: Path) -> int:
    """Add up the files of a folder; one that is evicted meanwhile does not count."""
    total = 0
    for file in folder.glob("*.kv"):
        with suppress(FileNotFoundError):
            total += file.stat().st_size
    return total


def test_two_thousand_requests_stay_within_the_disk_and_the_memory(
    tmp_path: Path, llama: Path
) -> None:
    kv_dir = tmp_path / "kv"

    def open_llm(blocks: int, cap_bytes: float) -> LLM:
        return LLM(
            config=EngineConfig(
                model=ModelConfig(model=llama, threads=1),
                cache=CacheConfig(
                    kv_codec="raw",
                    kv_dir=kv_dir,
                    device_pool_gib=blocks * block_bytes / (1 << 30),
                    disk_cap_gib=cap_bytes / (1 << 30),
                    disk_free_gib=0.0,
                ),
                scheduler=SchedulerConfig(max_batch_tokens=256, max_sequences=4),
            )
        )

    block_bytes = 1 << 20
    with open_llm(64, 1 << 30) as llm:
        block_bytes = llm.engine.info.kv_block_bytes
        tokens = llm.document_from_text(text(0)).tokens
    document_bytes = tokens // 64 * block_bytes
    cap_bytes = UPLOADS * document_bytes / 10
    extent_bytes = 17 * block_bytes
    chance = random.Random(0)
    with open_llm(5 * tokens // 64, cap_bytes) as llm:
        documents: list[tuple[int, Document]] = []
        answers: dict[int, tuple[int, ...]] = {}
        settled_bytes = settled_descriptors = restored = 0
        for number in range(UPLOADS):
            documents.append((number, llm.document_from_text(text(number), title=f"{number}")))
            if chance.random() < CLOSED:
                documents.pop(chance.randrange(len(documents)))[1].close()
            asked, document = chance.choice(documents[-40:])
            answer = document.ask("Which number?", GREEDY)
            assert answers.setdefault(asked, answer.token_ids) == answer.token_ids
            restored += answer.usage.computed_tokens < 128 and asked < number - 10
            assert stored_bytes(kv_dir) <= cap_bytes + extent_bytes
            if number == UPLOADS // 4:
                settled_bytes, settled_descriptors = resident_bytes(), descriptors()
        growth = resident_bytes() - settled_bytes
        print(f"\n{restored} questions on documents from disk, RSS +{growth / 1e6:.1f} MB")
        assert growth < RSS_GROWTH_BYTES
        assert descriptors() <= settled_descriptors + 2
        assert restored > 0
