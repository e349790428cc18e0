"""Says whether rounded weights cost a model too much; they are judged as a codec of their bits is.

The same model with its weights as the checkpoint has them is loaded beside it, once for a model,
and let go; the measurements are kept on disk like those of codecs.
"""

from collections.abc import Callable, Sequence
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
from longctx.quality.texts import TEXTS, Text
from longctx.quality.verdict import LOSSLESS, NARROW, is_settled, judge
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

    measured = cache.load()
    if measured is None:
        measured = measure_weights(
            config,
            folder,
            model,
            tokenizer,
            backend,
            cache_dir=cache_dir,
            workload=workload,
            content=lambda found: is_settled(judge_weights(model, name, found)),
            on_text=partial(told, say, f"what weights of {name} cost {spec.name}"),
        )
        if judge_weights(model, name, measured).judged:
            cache.store(measured)
    verdict = judge_weights(model, name, measured)
    if not verdict.passed:
        raise ModelRefused(
            f"--weights {name} does not pass the quality gate on {spec.name}: {verdict.reason}; "
            "leave it out, or --force-weights to serve with it all the same"
        )
    return verdict


def judge_weights(model: LoadedModel, name: str, measured: Measured) -> Verdict:
    """Judge what was measured of weights by the limits of a codec of as many bits."""
    limits = NARROW if name == "int4" else LOSSLESS
    return judge(name, measured, limits, vocab_size=model.spec.vocab_size)


def measure_weights(
    config: ModelConfig,
    folder: Path,
    model: LoadedModel,
    tokenizer: Tokenizer,
    backend: BackendFactory,
    *,
    cache_dir: Path | None,
    workload: Workload,
    texts: Sequence[Text] = TEXTS,
    seed: int = 0,
    content: Callable[[Measured], bool] = lambda _: False,
    on_text: Callable[[int, int], None] = lambda _done, _most: None,
) -> Measured:
    """Measure `model`, whose weights or rows are rounded, against the same with nothing rounded."""
    exact = replace(config, weights="auto", force_weights=False, activations="exact")
    whole = load_model(exact, folder, cache_dir=cache_dir)
    name = config.weights
    return measure_variants(
        Variant(exact_twin(whole)),
        Variant(whole),
        {name: Variant(model)},
        tokenizer,
        backend,
        workload=workload,
        texts=texts,
        seed=seed,
        content=lambda found: content(found[name]),
        on_text=on_text,
    )[name]
