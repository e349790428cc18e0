"""Chooses the codec that stores a model's KV; a lossy one has to pass the gate.

A codec is measured once per model and judged by fixed limits, and the measurements are kept on disk
under everything that they depend on. `auto` takes the first of AUTO that passes, else `raw`. A
codec that was asked for and fails is refused, unless it is forced. Read `choose_codec`.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from compress.codec import CODECS, Codec
from compress.shape import KVShape, ShapeRefused
from longctx.attention.backend import BackendFactory
from longctx.config import CacheConfig, KVCodec
from longctx.engine_info import CodecChoice, Measured, Verdict
from longctx.errors import ModelRefused
from longctx.model.loader import LoadedModel
from longctx.model.spec import ModelSpec
from longctx.quality.measure import RAW, Workload, measure
from longctx.quality.measurement_cache import MeasurementCache, identity_of
from longctx.quality.texts import TEXTS
from longctx.quality.verdict import LOSSLESS, NARROW, is_settled, judge
from longctx.text.tokenizer import Tokenizer

AUTO: tuple[KVCodec, ...] = ("int8",)  # what `auto` may choose, best first
AT_START = Workload()


def choose_codec(
    config: CacheConfig,
    model: LoadedModel,
    tokenizer: Tokenizer,
    backend: BackendFactory,
    *,
    cache_dir: Path | None,
    workload: Workload = AT_START,
    say: Callable[[str], None] = lambda _: None,
) -> CodecChoice:
    """Return the codec to serve with. Raises ModelRefused for one that was asked for and fails.

    `cache_dir` keeps measurements between starts; with None codecs are measured each time. `say`
    is told how far a measurement is.
    """
    spec = model.spec
    gate = Gate(model, tokenizer, backend, cache_dir, workload, say)
    if config.kv_codec == "auto":
        return _automatic(gate, spec)
    name = config.kv_codec
    refused = refusal(spec, name)
    if refused is not None:
        raise ModelRefused(refused)
    if gate.is_lossless(name):
        return CodecChoice(codec=name, reason=f"{name}, as asked; it is exact")
    if config.force_codec:
        return CodecChoice(
            codec=name,
            reason=f"{name}, forced: whether it damages this model was not measured",
            forced=True,
        )
    verdict = gate.verdict(name)
    if verdict.passed:
        return CodecChoice(
            codec=name, reason=f"{name}, as asked; it passed: {verdict.reason}", verdict=verdict
        )
    raise ModelRefused(
        f"--kv-codec {name} does not pass the quality gate on {spec.name}: {verdict.reason}; "
        "use --kv-codec raw, or --force-codec to serve with it all the same"
    )


def _automatic(gate: "Gate", spec: ModelSpec) -> CodecChoice:
    if gate.backend.decodes_pages:
        why = "without compiled kernels other pages would be unpacked for every token"
        return CodecChoice(codec=RAW, reason=f"{RAW}, since {why}")
    why_not = ""
    for name in AUTO:
        refused = refusal(spec, name)
        if refused is not None:
            why_not = f"{name} cannot store it: {refused}"
            continue
        verdict = gate.verdict(name)
        if verdict.passed:
            return CodecChoice(
                codec=name, reason=f"{name}, which passed: {verdict.reason}", verdict=verdict
            )
        why_not = f"{name} did not pass: {verdict.reason}"
    return CodecChoice(codec=RAW, reason=f"{RAW}, since {why_not}")


class Gate:
    """Judges codecs on one model by what was measured, now or at an earlier start.

    `verdict` takes seconds where it has to measure, and then computes with the model, so nothing
    else may use it meanwhile. `choose_codec` is its only caller, before an engine is made.
    """

    def __init__(
        self,
        model: LoadedModel,
        tokenizer: Tokenizer,
        backend: BackendFactory,
        cache_dir: Path | None,
        workload: Workload,
        say: Callable[[str], None],
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self.backend = backend
        self._workload = workload
        self._cache_dir = cache_dir
        self._say = say

    def is_lossless(self, name: str) -> bool:
        """Whether the codec gives back what it stored, bit for bit, so needs no measurement."""
        return all(codec.lossless for codec in codecs_of(self._model.spec, name))

    def verdict(self, name: str) -> Verdict:
        """Return what the gate says of a codec, after measuring it if that was not done yet."""
        spec = self._model.spec
        cache = self._cache_of(name)
        measured = cache.load()
        if measured is None:
            measured = measure(
                self._model,
                self._tokenizer,
                self.backend,
                (name,),
                workload=self._workload,
                content=lambda found: is_settled(judge_codec(spec, name, found[name])),
                on_text=partial(told, self._say, f"what KV codec {name} costs {spec.name}"),
            )[name]
            if spec.device.type == "cuda":
                torch.cuda.empty_cache()  # the pools are sized by what is free
            # What could not be judged, with a short context for one, may be judged another time.
            if judge_codec(spec, name, measured).judged:
                cache.store(measured)
        return judge_codec(spec, name, measured)

    def _cache_of(self, name: str) -> MeasurementCache:
        """Return the cache entry of a codec; another model, dtype, codec or program has another."""
        spec = self._model.spec
        versions = {(codec.name, codec.version) for codec in codecs_of(spec, name)}
        return MeasurementCache(
            self._cache_dir,
            (
                *identity_of(spec),
                self._tokenizer.fingerprint,
                self.backend.__qualname__,
                sorted(versions),
                self._workload,
                TEXTS,
            ),
        )


def told(say: Callable[[str], None], subject: str, done: int, most: int) -> None:
    """Say how far a measurement is, once for each text."""
    say(f"measuring {subject}, once for this model: {done} of at most {most} texts")


def codecs_of(spec: ModelSpec, name: str) -> Iterator[Codec]:
    """Yield the codec of each distinct shape of layers. Raises ShapeRefused."""
    for kv_heads, head_dim in {(layer.kv_heads, layer.head_dim) for layer in spec.layers}:
        yield CODECS[name](KVShape(kv_heads=kv_heads, head_dim=head_dim, dtype=spec.dtype))


def refusal(spec: ModelSpec, name: str) -> str | None:
    """Return why the codec cannot store this model's heads; None if it can."""
    try:
        list(codecs_of(spec, name))
    except ShapeRefused as error:
        return str(error)
    return None


def bits_per_value(spec: ModelSpec, name: str) -> float:
    """Return the bits that a codec stores for each key and value, with its scales and padding."""
    codecs = list(codecs_of(spec, name))
    stored = sum(codec.page_bytes for codec in codecs)
    return 8 * stored / sum(codec.shape.values_per_page for codec in codecs)


def judge_codec(spec: ModelSpec, name: str, measured: Measured) -> Verdict:
    """Judge what was measured of a codec by the limits of its width."""
    limits = LOSSLESS if bits_per_value(spec, name) >= 8 else NARROW
    return judge(name, measured, limits, vocab_size=spec.vocab_size)
