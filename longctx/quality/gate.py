"""Which codec stores a model's KV: the gate that a lossy one has to pass, and what it decided.

A codec is measured once per model, judged by fixed limits, and the figures are kept on disk under
everything that they depend on. `auto` takes the first of AUTO that passes, else `raw`; a codec
that was asked for and fails is refused, unless it is forced. Read `choose_codec`.
"""

import hashlib
import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

import longctx
from compress.codec import CODECS, Codec
from compress.shape import KVShape, ShapeRefused
from longctx.attention.reference import ReferenceAttention
from longctx.attention.torch_backend import TorchAttention
from longctx.config import CacheConfig
from longctx.errors import ModelRefused
from longctx.model import LoadedModel, ModelSpec
from longctx.quality.damage import Damage
from longctx.quality.measure import EXACT, Backend, Measured, Workload, measure
from longctx.quality.texts import TEXTS
from longctx.tokenizer import Tokenizer

AUTO = ("int8",)  # what `auto` may choose, best first
# They decode pages anew in every step that reads them; kernels read them as they lie.
UNPACKING = (ReferenceAttention, TorchAttention)
AT_START = Workload()
MIN_ROWS = 16  # of a part, or it is not judged


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a codec may cost. `kl` holds for the whole 95% interval, the others for the mean."""

    kl: float  # nats per token
    flips: float
    perplexity_rise: float


# A codec that stores 8 bits and more per value has to be lossless in practice; a narrower one,
# which nobody gets without asking for it, may cost about what weights of 5 bits do.
LOSSLESS = Limits(kl=1e-3, flips=0.02, perplexity_rise=0.01)
NARROW = Limits(kl=2e-2, flips=0.10, perplexity_rise=0.03)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """`text` and `own` say how the two parts were judged, `faults` what is beyond the limits.

    A model for which nothing could be judged has no faults, and the codec has not passed either.
    """

    codec: str
    measured: Measured
    limits: Limits
    judged: tuple[str, ...]  # parts
    faults: tuple[str, ...]
    text_is_foreign: bool  # predicted worse than by guessing: no text of this model's

    @property
    def passed(self) -> bool:
        return bool(self.judged) and not self.faults

    @property
    def reason(self) -> str:
        if self.faults:
            return "; ".join(self.faults)
        if not self.judged:
            return "its context or answers are too short to tell"
        parts = {"text": self.measured.text, "own": self.measured.own}
        known = ((part, parts[part]) for part in self.judged)
        figures = [f"{PARTS[part]} {damage.kl:.1e}" for part, damage in known if damage is not None]
        return f"KL {' and '.join(figures)} nats, at most {self.limits.kl:g} allowed"


PARTS = {"text": "on text", "own": "in its own answers"}


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecChoice:
    """`verdict` is None where nothing had to be measured; `reason` is for people, in one line."""

    codec: str
    reason: str
    forced: bool = False
    verdict: Verdict | None = None


def choose_codec(
    config: CacheConfig,
    model: LoadedModel,
    tokenizer: Tokenizer,
    backend: Backend,
    *,
    cache_dir: Path | None,
    workload: Workload = AT_START,
) -> CodecChoice:
    """The codec to serve with. Raises ModelRefused for one that was asked for and fails.

    `cache_dir` keeps figures between starts; None: they are taken each time.
    """
    spec = model.spec
    gate = Gate(model, tokenizer, backend, cache_dir, workload)
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
    if gate.backend in UNPACKING:
        why = "without compiled kernels other pages would be unpacked for every token"
        return CodecChoice(codec=EXACT, reason=f"{EXACT}, since {why}")
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
    return CodecChoice(codec=EXACT, reason=f"{EXACT}, since {why_not}")


class Gate:
    """Measures codecs on one model, or remembers that it did."""

    def __init__(
        self,
        model: LoadedModel,
        tokenizer: Tokenizer,
        backend: Backend,
        cache_dir: Path | None,
        workload: Workload,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self.backend = backend
        self._workload = workload
        self._folder = None if cache_dir is None else cache_dir / "quality"

    def is_lossless(self, name: str) -> bool:
        return all(codec.lossless for codec in codecs_of(self._model.spec, name))

    def verdict(self, name: str) -> Verdict:
        measured = self._recall(name)
        if measured is None:
            found = measure(
                self._model, self._tokenizer, self.backend, (name,), workload=self._workload
            )
            measured = found[name]
            if self._model.spec.device.type == "cuda":
                torch.cuda.empty_cache()  # the pools are sized by what is free
            self._remember(name, measured)
        return judge(self._model.spec, name, measured)

    def _path(self, name: str) -> Path | None:
        """The file of these figures: another model, type, codec or program is another file."""
        if self._folder is None:
            return None
        spec = self._model.spec
        versions = {(codec.name, codec.version) for codec in codecs_of(spec, name)}
        identity = (
            longctx.__version__,
            spec.fingerprint,
            spec.rope_identity,
            str(spec.dtype),
            spec.device.type,
            self.backend.__qualname__,
            sorted(versions),
            self._workload,
            TEXTS,
        )
        return self._folder / f"{hashlib.sha256(repr(identity).encode()).hexdigest()}.json"

    def _recall(self, name: str) -> Measured | None:
        path = self._path(name)
        try:
            return None if path is None else msgspec.json.decode(path.read_bytes(), type=Measured)
        except (OSError, msgspec.DecodeError):
            return None

    def _remember(self, name: str, measured: Measured) -> None:
        path = self._path(name)
        # What could not be judged, with a short context for one, may be judged another time.
        if path is None or not judge(self._model.spec, name, measured).judged:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
                file.write(msgspec.json.encode(measured))
            os.replace(file.name, path)  # two servers may start at once
        except OSError:
            return


def codecs_of(spec: ModelSpec, name: str) -> Iterator[Codec]:
    """The codec for each distinct layer. Raises ShapeRefused."""
    for kv_heads, head_dim in {(layer.kv_heads, layer.head_dim) for layer in spec.layers}:
        yield CODECS[name](KVShape(kv_heads=kv_heads, head_dim=head_dim, dtype=spec.dtype))


def refusal(spec: ModelSpec, name: str) -> str | None:
    """Why the codec cannot store this model's heads; None if it can."""
    try:
        list(codecs_of(spec, name))
    except ShapeRefused as error:
        return str(error)
    return None


def bits_per_value(spec: ModelSpec, name: str) -> float:
    codecs = list(codecs_of(spec, name))
    stored = sum(codec.page_bytes for codec in codecs)
    return 8 * stored / sum(codec.shape.values_per_page for codec in codecs)


def judge(spec: ModelSpec, name: str, measured: Measured) -> Verdict:
    limits = LOSSLESS if bits_per_value(spec, name) >= 8 else NARROW
    text, own = measured.text, measured.own
    foreign = text is not None and text.nats >= math.log(spec.vocab_size)
    parts = {
        part: damage
        for part, damage in (("text", None if foreign else text), ("own", own))
        if damage is not None and damage.rows >= MIN_ROWS
    }
    faults = [fault for part, damage in parts.items() for fault in _faults(part, damage, limits)]
    return Verdict(
        codec=name,
        measured=measured,
        limits=limits,
        judged=tuple(parts),
        faults=tuple(faults),
        text_is_foreign=foreign,
    )


def _faults(part: str, damage: Damage, limits: Limits) -> Iterator[str]:
    """Not-a-number is a fault: nothing is known to be within a limit then."""
    where = PARTS[part]
    if not damage.kl + damage.kl_error <= limits.kl:
        yield (
            f"KL {where} is {damage.kl:.2g} +- {damage.kl_error:.1g} nats, the limit {limits.kl:g}"
        )
    if not damage.flips <= limits.flips:
        yield (
            f"{damage.flips:.1%} of the likeliest tokens change {where}, the limit is "
            f"{limits.flips:.0%}"
        )
    if not damage.perplexity_rise <= limits.perplexity_rise:
        yield (
            f"perplexity {where} rises by {damage.perplexity_rise:.1%}, the limit is "
            f"{limits.perplexity_rise:.0%}"
        )
