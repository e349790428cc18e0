"""What a level of exactness costs a model is measured through the engine, judged and remembered."""

from pathlib import Path

import pytest

from longctx.config import CacheConfig, EngineConfig, ModelConfig
from longctx.embedded import model_path
from longctx.engine.engine import Engine
from longctx.engine_info import Measured
from longctx.open_engine import open_engine
from longctx.quality import level_gate
from longctx.quality.level_gate import judge_level, level_verdict
from longctx.quality.level_measure import LevelWorkload, measure_levels
from longctx.quality.measure import frame_of
from longctx.quality.texts import TEXTS
from longctx.quality.verdict import judge
from prompt_cache.level import EXACT, MODULAR, Level
from tests.support.recorded_engine import Eager

COMPUTED = Level(10_000)  # more than a module has
SHORT = LevelWorkload(module_tokens=100, text_tokens=40, own_tokens=8)


def engine(folder: Path, cache_dir: Path, codec: str = "raw", *, dtype: str = "float32") -> Engine:
    """An engine that computes in float32 unless told: then only the level changes what it says."""
    model = ModelConfig(threads=1, dtype=dtype)  # type: ignore[arg-type]
    cache = CacheConfig(kv_codec=codec, force_codec=codec != "raw", device_pool_gib=0.01)
    return open_engine(EngineConfig(model=model, cache=cache), folder, cache_dir=cache_dir)


def test_what_is_compared_with_is_what_the_model_says(llama: Path, tmp_path: Path) -> None:
    """Rows and the tokens that they are judged by: `exact` costs what transformers computes."""
    measured_engine = engine(llama, tmp_path)
    (measured,) = measure_levels(measured_engine, [COMPUTED], workload=SHORT).values()
    assert measured.text is not None and measured.own is not None
    assert measured.text.kl < 1e-6 and measured.own.kl < 1e-6
    assert measured.text.flips == measured.own.flips == 0.0
    tokenizer, eager = measured_engine.tokenizer, Eager(llama)
    nats: list[float] = []
    for number, text in enumerate(TEXTS):
        before, _ = frame_of(tokenizer, text, text.questions[0])
        other = tokenizer.encode(TEXTS[number - 1].body)[: SHORT.module_tokens]
        body = tokenizer.encode(text.body)[: SHORT.module_tokens + SHORT.text_tokens]
        tokens = [*before, *other, *body]
        rows = eager.rows(tokens).log_softmax(-1)
        judged = range(len(tokens) - SHORT.text_tokens + 1, len(tokens))
        nats += [-float(rows[at - 1, tokens[at]]) for at in judged]
    assert measured.text.rows == len(nats)
    assert measured.text.nats == pytest.approx(sum(nats) / len(nats), abs=1e-4)


@pytest.mark.parametrize("codec", ["raw", "int8"])
def test_a_language_model_does_not_tolerate_modules_apart(codec: str, tmp_path: Path) -> None:
    probe = engine(model_path("probe"), tmp_path, codec)
    for level in (MODULAR, Level(16)):
        verdict = judge_level(probe, level, cache_dir=tmp_path)
        assert not verdict.passed
        assert verdict.level == level.name
        assert "KL on text is" in verdict.reason
    assert judge_level(probe, EXACT, cache_dir=tmp_path).passed


def test_the_needle_model_tolerates_modules_apart(tmp_path: Path) -> None:
    verdict = level_verdict(
        engine(model_path("needle"), tmp_path), MODULAR, level_gate.AT_FIRST_USE, cache_dir=tmp_path
    )
    assert verdict.passed and verdict.judged == ("own",), verdict.reason


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_rounding_of_a_type_is_no_damage(dtype: str, tmp_path: Path) -> None:
    probe = engine(model_path("probe"), tmp_path, dtype=dtype)
    found = measure_levels(probe, [MODULAR, COMPUTED], workload=LevelWorkload())
    computed, modular = found[COMPUTED].text, found[MODULAR].text
    assert computed is not None and modular is not None
    assert computed.raw_kl > 0 and abs(computed.kl) <= 2 * computed.kl_error
    assert modular.raw_kl == computed.raw_kl  # one exact pass, and one of `exact`, for all levels
    vocab_size = probe.model.spec.vocab_size
    assert judge("computed", found[COMPUTED], level_gate.LIMITS, vocab_size=vocab_size).passed
    assert not judge("modular", found[MODULAR], level_gate.LIMITS, vocab_size=vocab_size).passed


def test_figures_are_remembered(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = level_verdict(engine(llama, tmp_path), MODULAR, SHORT, cache_dir=tmp_path)

    def measure_again(*_: object, **__: object) -> dict[Level, Measured]:
        raise AssertionError("measured twice")

    monkeypatch.setattr(level_gate, "measure_levels", measure_again)
    assert level_verdict(engine(llama, tmp_path), MODULAR, SHORT, cache_dir=tmp_path) == first
    with pytest.raises(AssertionError):
        level_verdict(engine(llama, tmp_path), Level(16), SHORT, cache_dir=tmp_path)
    with pytest.raises(AssertionError):
        level_verdict(engine(llama, tmp_path, "int8"), MODULAR, SHORT, cache_dir=tmp_path)


def test_levels_are_compared_with_exact_in_the_same_codec(llama: Path, tmp_path: Path) -> None:
    """What a codec costs is another gate's business."""
    found = measure_levels(engine(llama, tmp_path, "int4"), [MODULAR, COMPUTED], workload=SHORT)
    modular, computed = found[MODULAR].text, found[COMPUTED].text
    assert modular is not None and computed is not None
    assert computed.kl < 1e-6 < modular.kl
