"""Says whether rounded weights cost a model too much; they are judged as an 8-bit codec is.

The same model with its weights as the checkpoint has them is loaded beside it, once for a model,
and let go; the measurements are kept on disk like those of codecs.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from longctx.attention.backend import BackendFactory
from longctx.config import ModelConfig
from longctx.engine_info import Measured, Verdict
from longctx.errors import ModelRefused
from longctx.model.exact import exact_twin
from longctx.model.loader import LoadedModel, load_model
from longctx.quality.gate import AT_START, told
from longctx.quality.measure import Variant, Workload, measure_variants
from longctx.quality.measurement_cache import MeasurementCache, identity_of
from longctx.quality.texts import TEXTS
from longctx.quality.verdict import LOSSLESS, is_settled, judge
from longctx.text.tokenizer import Tokenizer


def check_weights(
    config: ModelConfig,
    folder: Path,
    model: LoadedModel,
    tokenizer: Tokenizer,
    backend: BackendFactory,
    *,
    cache_dir: Path | None,
    workload: Workload = AT_START,
    say: Callable[[str], None] = lambda _: None,
) -> Verdict | None:
    """Return what the gate says of the weights that `model` was loaded with; None if not rounded.

    Raises ModelRefused where they cost it too much, unless `config` forces them: they are not
    measured then.
    """
    if config.weights == "auto" or config.force_weights:
        return None
    spec, name = model.spec, config.weights
    cache = MeasurementCache(
        cache_dir, (*identity_of(spec), backend.__qualname__, "weights", name, workload, TEXTS)
    )

    def judged(found: Measured) -> Verdict:
        return judge(name, found, LOSSLESS, vocab_size=spec.vocab_size)

    measured = cache.load()
    if measured is None:
        whole = load_model(replace(config, weights="auto"), folder, cache_dir=cache_dir)
        measured = measure_variants(
            Variant(exact_twin(whole)),
            Variant(whole),
            {name: Variant(model)},
            tokenizer,
            backend,
            workload=workload,
            content=lambda found: is_settled(judged(found[name])),
            on_text=partial(told, say, f"what weights of {name} cost {spec.name}"),
        )[name]
        if judged(measured).judged:
            cache.store(measured)
    verdict = judged(measured)
    if not verdict.passed:
        raise ModelRefused(
            f"--weights {name} does not pass the quality gate on {spec.name}: {verdict.reason}; "
            "leave it out, or --force-weights to serve with it all the same"
        )
    return verdict
