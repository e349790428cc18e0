"""How many tokens a step computes where nobody has said it."""

import pytest

from longctx.config import CacheConfig, EngineConfig, SchedulerConfig
from longctx.model.named import find_model
from longctx.open_engine import engine_parts

KIB = 1 << 10


@pytest.mark.parametrize(
    ("token_bytes", "tokens"),
    [(None, 512), (1, 2048), (4 * KIB, 2048), (16 * KIB, 1024), (32 * KIB, 512), (128 * KIB, 512)],
)
def test_a_small_model_computes_more_tokens_in_a_step_of_a_cpu(
    token_bytes: int | None, tokens: int
) -> None:
    config = SchedulerConfig()
    assert config.batch_tokens("cpu", token_bytes=token_bytes) == tokens
    assert config.batch_tokens("cuda", token_bytes=token_bytes) == 4096


def test_what_is_asked_for_is_taken() -> None:
    assert SchedulerConfig(max_batch_tokens=300).batch_tokens("cpu", token_bytes=1) == 300
    assert SchedulerConfig(max_sequences=700).batch_tokens("cpu") == 700


def test_ranks_have_blocks_of_their_own() -> None:
    assert SchedulerConfig().batch_tokens("cpu", ranks=4) == 1024
    assert SchedulerConfig().batch_tokens("cuda", ranks=4) == 4 * 4096


def test_the_embedded_model_is_small() -> None:
    cache = CacheConfig(device_pool_gib=0.01, host_pool_gib=0.0)
    parts = engine_parts(EngineConfig(cache=cache), find_model(None))
    assert parts.scheduler.batch_tokens == 2048
