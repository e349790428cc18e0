"""What each codec costs a model, against `raw`: KL divergence, changed tokens, perplexity.

With rounded weights it is also what these cost, against those of the checkpoint, or what rows of 16
bits cost.

The measurement is the quality gate's, through the cache that serves, and by default as long as the
gate measures at most, but for all codecs and without a limit of time. Without --model it is the
embedded `probe`, a language model with ordinary attention.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import torch
from rich.table import Table

from compress.codec import CODECS
from longctx.attention.registry import BACKENDS, backend_for
from longctx.bench.config import BenchConfig, QualityConfig
from longctx.bench.picture import Series, draw_bars
from longctx.bench.report import Parameter, Report, Result
from longctx.config import EngineConfig
from longctx.embedded import model_path
from longctx.engine_info import PARTS, Damage, Verdict
from longctx.errors import InvalidRequest
from longctx.model.loader import load_model
from longctx.model.spec import ModelSpec
from longctx.quality.gate import bits_per_value, judge_codec, refusal
from longctx.quality.measure import RAW, Workload, measure
from longctx.quality.texts import TEXTS, Text
from longctx.quality.weights_gate import judge_weights, measure_weights
from longctx.text.tokenizer import Tokenizer

WEIGHT_BITS: Final = {"int8": 8.5, "int4": 5.0}  # with the scales and minima of groups


def run(
    engine: EngineConfig,
    bench: BenchConfig,
    quality: QualityConfig,
    *,
    say: Callable[[str], None],
) -> Report:
    """Measures the named codec, or every one that can hold the model's heads, against `raw`."""
    if engine.model.threads is not None:
        torch.set_num_threads(engine.model.threads)
    folder = engine.model.model or model_path("probe")
    model, tokenizer = load_model(engine.model, folder), Tokenizer(folder)
    texts = TEXTS if quality.text_file is None else (_read(quality.text_file),)
    workload = Workload(
        text_tokens=(quality.text_tokens,) * max(len(text.questions) for text in texts),
        own_tokens=quality.own_tokens,
        limit_seconds=None,
    )
    backend = backend_for(engine.model.attention_backend, model.spec.device)
    codecs = tuple(_codecs(engine.cache.kv_codec, model.spec, say))
    say(f"{', '.join(codecs)} against {RAW}")
    measured = measure(
        model,
        tokenizer,
        BACKENDS[backend],
        codecs,
        workload=workload,
        texts=texts,
        seed=bench.seed,
        on_text=lambda done, most: say(f"text {done} of {most}"),
    )
    verdicts = {codec: judge_codec(model.spec, codec, measured[codec]) for codec in codecs}
    bits = {codec: bits_per_value(model.spec, codec) for codec in codecs}
    kinds: dict[str, dict[str, Parameter]] = {codec: {"codec": codec} for codec in codecs}
    rounded = engine.model.weights != "auto"
    if rounded or model.rounds_rows:
        name = f"weights {engine.model.weights}" if rounded else "rows of 16 bits"
        say(f"{name} against what is exact")
        cost = measure_weights(
            engine.model,
            folder,
            model,
            tokenizer,
            BACKENDS[backend],
            cache_dir=None,
            workload=workload,
            texts=texts,
            seed=bench.seed,
            on_text=lambda done, most: say(f"text {done} of {most}"),
        )
        verdicts[name] = judge_weights(model, engine.model.weights, cost)
        bits[name] = WEIGHT_BITS[engine.model.weights] if rounded else 16
        kinds[name] = {"weights": engine.model.weights, "rounds_rows": model.rounds_rows}
    parameters: dict[str, Parameter] = {
        "model": model.spec.name,
        "dtype": str(model.spec.dtype).removeprefix("torch."),
        "device": str(model.spec.device),
        "backend": backend,
        "text": "built in" if quality.text_file is None else quality.text_file.name,
    }
    subtitle = ", ".join(str(parameters[name]) for name in ("model", "dtype", "backend", "text"))
    rows = [
        row
        for name, verdict in verdicts.items()
        for row in _results(verdict, {**parameters, **kinds[name]})
    ]
    return Report(
        results=tuple(rows),
        tables=(_table(verdicts, bits, subtitle),),
        draw=partial(_draw, verdicts, subtitle),
    )


def _codecs(chosen: str, spec: ModelSpec, say: Callable[[str], None]) -> Iterator[str]:
    """Returns the codec that was named, or all that can hold the model's heads; never `raw`."""
    if chosen == RAW:
        known = ", ".join(name for name in CODECS if name != RAW)
        raise InvalidRequest(
            f"kv_codec {chosen!r} cannot be compared with raw; choose from {known}"
        )
    for name in CODECS if chosen == "auto" else (chosen,):
        reason = None if name == RAW else refusal(spec, name)
        if reason is not None:
            say(f"{name} is left out: {reason}")
        elif name != RAW:
            yield name


def _read(file: Path) -> Text:
    try:
        body = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"cannot read {file} as UTF-8 text: {error}") from error
    questions = ("Summarize this text.", "What is the most important point of this text?")
    return Text(title=file.name, body=body, questions=questions)


def _parts(verdict: Verdict) -> Iterator[tuple[str, Damage]]:
    for part, damage in (("text", verdict.measured.text), ("own", verdict.measured.own)):
        if damage is not None:
            yield part, damage


def _results(verdict: Verdict, parameters: Mapping[str, Parameter]) -> Iterator[Result]:
    for part, damage in _parts(verdict):
        at: dict[str, Parameter] = {**parameters, "part": part, "tokens": damage.rows}
        for metric, value, error, unit in (
            ("KL", damage.kl, damage.kl_error, "nats/token"),
            ("flips", damage.flips, damage.flips_error, "share"),
            ("nats more", damage.more_nats, damage.more_nats_error, "nats/token"),
        ):
            yield Result(metric=metric, value=value, unit=unit, parameters={**at, "error": error})
        raw = damage.raw_perplexity
        yield Result(
            metric="perplexity",
            value=raw * (1 + damage.perplexity_rise),
            unit="",
            parameters={**at, "raw": raw},
        )
    yield Result(
        metric="passes the gate",
        value=int(verdict.passed),
        unit="",
        parameters={**parameters, "why": verdict.reason},
    )


def _table(verdicts: Mapping[str, Verdict], bits: Mapping[str, float], subtitle: str) -> Table:
    foreign = any(verdict.text_is_foreign for verdict in verdicts.values())
    note = "; text that it predicts worse than by guessing is not judged" if foreign else ""
    table = Table(title="What codecs and weights cost", caption=f"{subtitle}; 95% intervals{note}")
    for name in ("codec", "bits", "on", "tokens", "KL, nats", "flips", "perplexity"):
        table.add_column(name, justify="right")
    table.add_column("gate")
    for name, verdict in verdicts.items():
        first = True
        for part, damage in _parts(verdict):
            table.add_row(
                name if first else "",
                f"{bits[name]:.2f}" if first else "",
                part,
                f"{damage.rows:,}",
                f"{damage.kl:.1e} ± {damage.kl_error:.0e}",
                f"{damage.flips:.1%} ± {damage.flips_error:.1%}",
                f"{damage.raw_perplexity:.4g} {damage.perplexity_rise:+.2%}",
                ("passes" if verdict.passed else "fails") if first else "",
            )
            first = False
    return table


def _draw(verdicts: Mapping[str, Verdict], subtitle: str, path: Path) -> None:
    def values(part: str) -> Sequence[float | None]:
        found = (dict(_parts(verdict)).get(part) for verdict in verdicts.values())
        return [None if damage is None or not damage.kl else damage.kl for damage in found]

    draw_bars(
        path,
        title="KL divergence from what is exact",
        subtitle=subtitle,
        groups=list(verdicts),
        series=[Series(label=label, values=values(part)) for part, label in PARTS.items()],
        unit="nats",
        logarithmic=True,
    )
