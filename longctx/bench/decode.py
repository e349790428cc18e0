"""Prefill and decode of one sequence at several depths, for every codec, and where the time goes.

Long contexts are not computed to be measured: their blocks are filled with random keys and values
and published under the keys of a prompt, which the engine then finds as a cached prefix. So each
figure is taken on the engine's whole path. Decode is the mean time between tokens. Prefill of a
prompt is summed up from chunks timed at its start and at the depths of all contexts, since the
time of a chunk grows linearly with its depth. With `--against transformers` see `duel.py`.
"""

import gc
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import torch
from rich.table import Table

from compress.shape import BLOCK_TOKENS
from longctx.bench.config import BenchConfig, DecodeConfig, RoundsConfig
from longctx.bench.duel import run_duels
from longctx.bench.measured_engine import MeasuredEngine, Shares
from longctx.bench.picture import Series, draw_bars
from longctx.bench.random_model import SIZES, write_large_llama, write_random_llama
from longctx.bench.report import Parameter, Report, Result
from longctx.bench.timing import Stopwatch, TimedAnswer
from longctx.config import KV_CODECS, EngineConfig, KVCodec
from longctx.errors import ModelRefused
from longctx.request import SamplingParams, Segment

PROFILED_TOKENS = 8
TAIL_TOKENS = 16  # of a decode prompt; new ones each round


@dataclass(frozen=True, slots=True, kw_only=True)
class Depth:
    """What one codec takes at one context length, in seconds."""

    context: int
    chunk: int  # tokens of its last chunk
    prefill_seconds: float  # of the whole prompt
    chunk_seconds: float  # of its last chunk
    token_seconds: float
    prefill_shares: Shares  # of its last chunk
    decode_shares: Shares


def run(
    engine: EngineConfig,
    bench: BenchConfig,
    rounds: RoundsConfig,
    decode: DecodeConfig,
    *,
    say: Callable[[str], None],
) -> Report:
    """Measures every codec at every depth, or longctx against transformers."""
    with _model_folder(engine, decode, bench.seed) as folder:
        if decode.against == "transformers":
            exact = "raw" if engine.cache.kv_codec == "auto" else engine.cache.kv_codec
            return run_duels(
                _with_codec(engine, exact), bench.seed, rounds.rounds, decode, folder, say=say
            )
        chosen = engine.cache.kv_codec
        found: dict[str, list[Depth]] = {}
        parameters: dict[str, Parameter] = {}
        for codec in KV_CODECS if chosen == "auto" else (chosen,):
            say(f"{codec}: loading")
            try:
                measured = MeasuredEngine(_with_codec(engine, codec), folder)
            except ModelRefused as error:
                if chosen != "auto" or codec == "raw":
                    raise
                say(f"{codec} is left out: {error}")
                continue
            found[codec] = list(_depths(measured, rounds.rounds, decode, bench.seed, say))
            info = measured.info
            parameters = {
                "model": info.model_name if engine.model.model else f"Llama {decode.model_size}",
                "dtype": info.dtype,
                "device": info.device,
                "backend": info.backend,
                "threads": torch.get_num_threads(),
                "rounds": rounds.rounds,
            }
            del measured
            gc.collect()  # its pools, before the next one's
    title = ", ".join(str(parameters[name]) for name in ("model", "dtype", "backend", "device"))
    subtitle = f"{title}, {parameters['threads']} threads"
    return Report(
        results=tuple(_results(found, parameters)),
        tables=(_table(found, subtitle),),
        draw=partial(_draw, found, subtitle),
    )


def _with_codec(engine: EngineConfig, codec: KVCodec) -> EngineConfig:
    """Forces the codec: the gate is not asked, since random weights hide what a codec costs."""
    cache = replace(engine.cache, kv_codec=codec, force_codec=True)
    return replace(engine, cache=cache)


@contextmanager
def _model_folder(engine: EngineConfig, decode: DecodeConfig, seed: int) -> Iterator[Path]:
    if engine.model.model is not None:
        yield engine.model.model
        return
    with TemporaryDirectory(prefix="longctx-bench-") as folder:
        size = SIZES[decode.model_size]
        write = write_large_llama if size.large else write_random_llama
        write(Path(folder), size, seed=seed)
        yield Path(folder)


def _depths(
    engine: MeasuredEngine,
    rounds: int,
    decode: DecodeConfig,
    seed: int,
    say: Callable[[str], None],
) -> Iterator[Depth]:
    contexts = sorted(decode.token_lengths)
    rng = random.Random(seed)
    base = [rng.randrange(3, engine.info.vocab_size) for _ in range(contexts[-1])]
    engine.plant(base)
    runs = _Runs(engine, base, rng)
    runs.answer(min(contexts[0], BLOCK_TOKENS), decode.new_tokens)  # warms up
    chunk = engine.batch_tokens
    ends = {(max(0, context - chunk), min(chunk, context)) for context in contexts}
    seconds: dict[tuple[int, int], float] = {}  # by first position and tokens
    shares: dict[tuple[int, int], Shares] = {}
    for place in sorted(ends | {(0, min(chunk, contexts[-1]))}):
        say(f"{engine.info.kv_codec}: prefill at {place[0]:,}")
        seconds[place] = median(runs.chunk(*place) for _ in range(rounds))
        with engine.profile() as profile:
            runs.chunk(*place)
        shares[place] = profile.shares()
    for context in contexts:
        say(f"{engine.info.kv_codec}: decode after {context:,}")
        token_seconds = median(runs.answer(context, decode.new_tokens) for _ in range(rounds))
        with engine.profile(decode_only=True) as profile:
            runs.answer(context, PROFILED_TOKENS)
        last = (max(0, context - chunk), min(chunk, context))
        yield Depth(
            context=context,
            chunk=last[1],
            prefill_seconds=summed(context, chunk, seconds),
            chunk_seconds=seconds[last],
            token_seconds=token_seconds,
            prefill_shares=shares[last],
            decode_shares=profile.shares(),
        )


class _Runs:
    """Runs prompts that begin like `base`, whose blocks are in the cache, and end like no other."""

    def __init__(self, engine: MeasuredEngine, base: Sequence[int], rng: random.Random) -> None:
        self._stopwatch = Stopwatch(engine)
        self._vocab_size = engine.info.vocab_size
        self._base = base
        self._rng = rng

    def chunk(self, place: int, tokens: int) -> float:
        """Returns the seconds that one step takes to compute `tokens` new tokens at `place`."""
        start = place // BLOCK_TOKENS * BLOCK_TOKENS
        prompt = (*self._base[:start], *self._new(tokens))
        return self._ask(prompt, 1).first_token_seconds

    def answer(self, context: int, new_tokens: int) -> float:
        """Returns the mean seconds between tokens of an answer to a prompt of `context` tokens."""
        tail = min(context, TAIL_TOKENS)
        prompt = (*self._base[: context - tail], *self._new(tail))
        return self._ask(prompt, new_tokens).token_interval_seconds

    def _new(self, count: int) -> tuple[int, ...]:
        return tuple(self._rng.randrange(3, self._vocab_size) for _ in range(count))

    def _ask(self, prompt: tuple[int, ...], new_tokens: int) -> TimedAnswer:
        sampling = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        return self._stopwatch.ask((Segment(token_ids=prompt),), sampling)


def summed(context: int, chunk: int, seconds: Mapping[tuple[int, int], float]) -> float:
    """Seconds for a whole prompt: the sum of its chunks, interpolated between measured depths."""
    if (0, context) in seconds:
        return seconds[0, context]
    whole = {start: taken for (start, tokens), taken in seconds.items() if tokens == chunk}
    starts = np.arange(0, context, chunk)
    lengths = np.minimum(chunk, context - starts)
    taken = np.interp(starts, list(whole), list(whole.values()))
    return float((taken * lengths).sum() / chunk)


def _results(
    found: Mapping[str, Sequence[Depth]], parameters: Mapping[str, Parameter]
) -> Iterator[Result]:
    for codec, depths in found.items():
        for depth in depths:
            at: dict[str, Parameter] = {
                **parameters,
                "kv_codec": codec,
                "context_tokens": depth.context,
            }
            yield Result(
                metric="prefill",
                value=depth.context / depth.prefill_seconds,
                unit="tokens/s",
                parameters={
                    **at,
                    "chunk_tokens": depth.chunk,
                    "chunk_seconds": depth.chunk_seconds,
                    **depth.prefill_shares.flat(),
                },
            )
            yield Result(
                metric="decode",
                value=1 / depth.token_seconds,
                unit="tokens/s",
                parameters={**at, **depth.decode_shares.flat()},
            )


def _table(found: Mapping[str, Sequence[Depth]], subtitle: str) -> Table:
    table = Table(
        title="One sequence, tokens/s",
        caption=f"{subtitle}; %: attention, linears, sampling, Python and the rest",
    )
    for name in ("KV", "context", "prefill", "%", "decode", "%"):
        table.add_column(name, justify="right")
    for codec, depths in found.items():
        for depth in depths:
            table.add_row(
                codec if depth is depths[0] else "",
                f"{depth.context:,}",
                f"{depth.context / depth.prefill_seconds:,.0f}",
                str(depth.prefill_shares),
                f"{1 / depth.token_seconds:,.1f}",
                str(depth.decode_shares),
            )
    return table


def _draw(found: Mapping[str, Sequence[Depth]], subtitle: str, path: Path) -> None:
    contexts = [depth.context for depth in next(iter(found.values()))]
    draw_bars(
        path,
        title="Time per decoded token",
        subtitle=subtitle,
        groups=[f"after {context:,}" for context in contexts],
        series=[
            Series(label=codec, values=[1000 * depth.token_seconds for depth in depths])
            for codec, depths in found.items()
        ],
        unit="ms",
    )
