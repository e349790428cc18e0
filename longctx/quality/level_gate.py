"""Says which levels of exactness a model tolerates, for prompts that are made of modules.

The level `exact` needs no gate. Another level is measured when it is first asked for on a model,
and judged by fixed limits; the measurements are kept on disk like those of codecs. Read
`judge_level`.
"""

from pathlib import Path

from compress.codec import CODECS
from compress.shape import KVShape
from longctx.engine.engine import Engine
from longctx.engine_info import Verdict
from longctx.quality.level_measure import LevelWorkload, measure_levels
from longctx.quality.measurement_cache import MeasurementCache, identity_of
from longctx.quality.texts import TEXTS
from longctx.quality.verdict import NARROW, judge
from longctx.request import LevelVerdict
from prompt_cache.level import EXACT, Level

AT_FIRST_USE = LevelWorkload()
# What somebody asks for by name, to compute less, may cost what a narrow codec may.
LIMITS = NARROW


def judge_level(
    engine: Engine,
    level: Level,
    *,
    cache_dir: Path | None,
    workload: LevelWorkload = AT_FIRST_USE,
) -> LevelVerdict:
    """Return what the gate says of a level on the engine's model and codec.

    The first time this takes up to `workload.limit_seconds` and a little. `cache_dir` keeps
    measurements between starts; with None levels are measured each time.
    """
    if level == EXACT:
        return LevelVerdict(level=level.name, passed=True, reason="it is exact")
    verdict = level_verdict(engine, level, workload, cache_dir=cache_dir)
    return LevelVerdict(level=level.name, passed=verdict.passed, reason=verdict.reason)


def level_verdict(
    engine: Engine, level: Level, workload: LevelWorkload, *, cache_dir: Path | None
) -> Verdict:
    """Return the same verdict with what was measured."""
    spec, codec = engine.model.spec, engine.info.kv_codec
    shapes = (
        KVShape(kv_heads=layer.kv_heads, head_dim=layer.head_dim, dtype=spec.dtype)
        for layer in spec.layers
    )
    versions = sorted({(each.name, each.version) for each in map(CODECS[codec], shapes)})
    model = (*identity_of(spec), engine.tokenizer.fingerprint, engine.info.backend)
    identity = (*model, versions, workload, level, TEXTS)
    cache = MeasurementCache(cache_dir, identity)
    measured = cache.load()
    if measured is None:
        (measured,) = measure_levels(engine, (level,), workload=workload).values()
    verdict = judge(level.name, measured, LIMITS, vocab_size=spec.vocab_size)
    if verdict.judged:  # what is too short to tell may be longer another time
        cache.store(measured)
    return verdict
