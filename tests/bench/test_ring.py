"""The ring benchmark: what is exact in it is exact; the projection behaves as arithmetic does."""

from pathlib import Path

import pytest

from longctx.bench.random_model import Size, write_random_llama
from longctx.bench.ring.projection import GPU_FLOP_PER_SECOND, LINKS, MODELS, Model, project
from longctx.bench.ring.virtual import chunks
from longctx.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_virtual_ranks_send_what_the_formula_says(tmp_path: Path, ranks: int) -> None:
    write_random_llama(tmp_path, Size(hidden=64, layers=2, heads=2, kv_heads=1, mlp=64), seed=0)
    config = EngineConfig(
        model=ModelConfig(model=tmp_path, threads=1),
        cache=CacheConfig(kv_codec="int8", force_codec=True, device_pool_gib=0.05),
        scheduler=SchedulerConfig(max_batch_tokens=512),
    )
    read = list(chunks(config, tmp_path, ranks, tuple(range(5, 1541))))
    assert [chunk.end for chunk in read] == [512, 1024, 1536]
    assert all(chunk.sent_bytes == chunk.formula_bytes for chunk in read)
    assert all(chunk.sent_bytes > 0 for chunk in read) == (ranks > 1)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_a_projection_is_never_better_than_perfect_and_better_with_better_links(
    model: Model,
) -> None:
    for tokens in (1 << 17, 1 << 20):
        times = [
            project(model, link, tokens, 32, flop_per_second=GPU_FLOP_PER_SECOND) for link in LINKS
        ]
        assert [each.seconds for each in times] == sorted(each.seconds for each in times)
        assert all(0 < each.efficiency <= 1 + 1e-9 for each in times)


def test_the_projection_stands_beside_what_was_published() -> None:
    """77 s with 93%: what the same GPUs would need if nothing were lost is within a tenth."""
    (large,) = (model for model in MODELS if model.name == "405B")
    projected = project(large, "InfiniBand", 1 << 20, 128, flop_per_second=GPU_FLOP_PER_SECOND)
    assert projected.ideal_seconds == pytest.approx(0.93 * 77, rel=0.1)
