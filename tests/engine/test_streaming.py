"""Contexts that are larger than the device are answered as if they were not."""

from pathlib import Path

import pytest

from longctx.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from longctx.errors import ContextTooLong, LongctxError
from longctx.llm import LLM
from longctx.request import SamplingParams

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


def config(
    kv_dir: Path | None, *, pool_gib: float, model: Path, codec: str, disk_free_gib: float = 0.0
) -> EngineConfig:
    return EngineConfig(
        model=ModelConfig(model=model, threads=1),
        cache=CacheConfig(
            kv_codec=codec,
            force_codec=True,
            kv_dir=kv_dir,
            device_pool_gib=pool_gib,
            disk_cap_gib=1,
            disk_free_gib=disk_free_gib,
        ),
        scheduler=SchedulerConfig(max_batch_tokens=256, max_sequences=4),
    )


TEXT = "".join(f"Ship {number} came in on day {number * 7 % 31}. " for number in range(96))


def llm_with(
    model: Path, kv_dir: Path | None, *, blocks: int, codec: str, disk_free_gib: float = 0.0
) -> LLM:
    """An engine whose device holds about that many blocks."""
    with LLM(config=config(None, pool_gib=0.05, model=model, codec=codec)) as large:
        info = large.engine.info
    pool_bytes = blocks * info.kv_block_bytes * (2 if info.kv_window_bytes else 1)
    return LLM(
        config=config(
            kv_dir,
            pool_gib=pool_bytes / (1 << 30),
            model=model,
            codec=codec,
            disk_free_gib=disk_free_gib,
        )
    )


@pytest.mark.parametrize("codec", ["raw", "int8"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_context_larger_than_the_device_has_the_same_answer(
    tmp_path: Path, request: pytest.FixtureRequest, family: str, codec: str
) -> None:
    model: Path = request.getfixturevalue(family)
    with LLM(config=config(None, pool_gib=0.05, model=model, codec=codec)) as large:
        document = large.document_from_text(TEXT)
        expected = [document.ask(f"{n}?", GREEDY).token_ids for n in range(3)]
    with llm_with(model, tmp_path, blocks=22, codec=codec) as small:
        capacity = small.engine.info.capacity_tokens
        document = small.document_from_text(TEXT)
        assert document.tokens > 1.2 * capacity, (document.tokens, capacity)
        answers = [document.ask(f"{n}?", GREEDY) for n in range(3)]
        assert [answer.token_ids for answer in answers] == expected
        assert all(answer.usage.computed_tokens < 128 for answer in answers)
        others = small.generate(["The sea", "A boat"], GREEDY)
        assert all(len(answer.token_ids) == 12 for answer in others)


def test_without_a_lower_tier_a_context_has_to_fit(llama: Path) -> None:
    with (
        llm_with(llama, None, blocks=22, codec="raw") as small,
        pytest.raises(ContextTooLong, match="device-pool-gib"),
    ):
        small.document_from_text(TEXT)


def test_what_the_disk_loses_under_a_running_answer_is_computed_again(
    tmp_path: Path, llama: Path
) -> None:
    with llm_with(llama, tmp_path, blocks=22, codec="raw") as small:
        document = small.document_from_text(TEXT)
        expected = document.ask("When?", GREEDY)
        for file in sorted(tmp_path.glob("*.kv"))[:1]:
            data = bytearray(file.read_bytes())
            data[-100] ^= 1
            file.write_bytes(data)
        again = document.ask("When?", GREEDY)
        assert again.token_ids == expected.token_ids
        assert again.usage.computed_tokens > 128
        assert document.ask("When?", GREEDY).token_ids == expected.token_ids


def test_a_context_that_no_tier_takes_ends_with_an_error(tmp_path: Path, llama: Path) -> None:
    with llm_with(llama, tmp_path, blocks=22, codec="raw", disk_free_gib=1e6) as small:
        with pytest.raises(LongctxError, match="disk-free-gib"):
            small.document_from_text(TEXT)
        (other,) = small.generate("The sea", GREEDY)
        assert len(other.token_ids) == 12
