"""Answers beside a long document: how steady they stay, and what the document still gets.

At several depths of a document some answers run, the document goes on being computed, and a short
chat arrives. Measured are the time between two tokens of the answers, the time to the first token
of the chat, and what the document's speed keeps beside them. Each depth is measured three ways:
answers alone and the document alone, both together, and both together with chunking off, where the
document's tokens are one chunk. Together the document comes in parts, with answers alone between
them by turns; the chat comes beside the first part, which does not count for the speed.

The document's beginning is not computed: its blocks are filled with random keys and values, as in
`longctx bench decode`. Nothing is written to a tier.
"""

import gc
import itertools
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from rich.table import Table

from compress.shape import BLOCK_TOKENS
from longctx.bench.config import BenchConfig, LoadConfig
from longctx.bench.measured_engine import MeasuredEngine
from longctx.bench.picture import Series, draw_bars
from longctx.bench.random_model import SIZES, write_random_llama
from longctx.bench.report import Parameter, Report, Result
from longctx.config import EngineConfig
from longctx.engine.scheduler import Scheduler, StepRoom
from longctx.errors import LongctxError
from longctx.request import FinishReason, Request, RequestClass, SamplingParams, Segment

ANSWER_TOKENS = 4096  # more than any is let write: they are aborted
COLUMNS = ("depth", "idle", "beside", "unchunked", "chat", "idle", "kept", "alone", "error")
SETTLED_TOKENS = 8  # of each answer, before anything is measured
PARTS = 4  # of the document's tokens, beside answers
QUIET_SECONDS = 60.0  # without a chat, before the document is measured alone: it takes minutes


@dataclass(slots=True)
class Watched:
    """When each token of the requests came, in seconds, and which requests have ended."""

    token_seconds: dict[str, list[float]] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)

    def intervals(self, names: Sequence[str], since: float) -> list[float]:
        """The times between tokens of these requests that ended after `since`."""
        return [
            later - earlier
            for name in names
            for earlier, later in itertools.pairwise(self.token_seconds[name])
            if later >= since
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Together:
    """Answers, a document and a chat at once; seconds."""

    intervals: tuple[float, ...]  # between tokens of the answers
    chat_seconds: float
    alone_intervals: tuple[float, ...]  # of the answers, between the parts of the document
    # Of all parts but the first: per token, after as many steps of answers alone are taken off.
    document_seconds_per_token: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AtDepth:
    """What was measured at one depth of the document."""

    depth: int
    alone_chat_seconds: float
    alone_document_seconds: float
    window_tokens: int
    chunked: Together
    unchunked: Together
    unchunked_document_seconds: float
    prediction_error: float | None

    @property
    def kept_speed(self) -> float:
        """The document's speed beside answers as a part of its speed alone in the time that the
        answers, at their own pace, leave to it."""
        alone = self.alone_document_seconds / self.window_tokens
        return alone / max(self.chunked.document_seconds_per_token, 1e-9)


class LoadScheduler(Scheduler):
    """The scheduler, but it can be told that nobody was there."""

    def let_pass(self, seconds: float) -> None:
        """Go on as if the last answer had ended so long ago."""
        self._lone.disturb(self._clock() - seconds)


class UnchunkedScheduler(LoadScheduler):
    """Computes what is left of a prompt in one step, as schedulers without chunks do."""

    def _fitting_tokens(self, past: int, smallest: int, room: StepRoom) -> int:
        return room.tokens


class LoadedEngine:
    """An engine on which several requests run at once; their tokens are timed."""

    def __init__(self, engine: MeasuredEngine, document_tokens: int, *, seed: int) -> None:
        self.engine = engine
        self.watched = Watched()
        self._rng = random.Random(seed)
        self.document = self.new_tokens(document_tokens)
        if self.document:
            engine.plant(self.document)
        self._numbers = itertools.count()

    def submit(
        self, prefix: Sequence[int], tokens: int, *, max_tokens: int, ingest: bool = False
    ) -> str:
        """Submit a prompt of `prefix` and so many new tokens; return its name."""
        name = f"load-{next(self._numbers)}"
        self.watched.token_seconds[name] = [time.perf_counter()]  # when it came
        self.engine.submit(
            Request(
                request_id=name,
                segments=(Segment(token_ids=(*prefix, *self.new_tokens(tokens))),),
                sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True),
                request_class=RequestClass.INGEST if ingest else RequestClass.INTERACTIVE,
            )
        )
        return name

    def new_tokens(self, tokens: int) -> tuple[int, ...]:
        vocab_size = self.engine.info.vocab_size
        return tuple(self._rng.randrange(3, vocab_size) for _ in range(tokens))

    def step(self) -> None:
        """Run one step. Raises LongctxError where a request fails."""
        for output in self.engine.step():
            if output.finish_reason is FinishReason.ERROR:
                raise LongctxError(output.error)
            now = time.perf_counter()
            self.watched.token_seconds[output.request_id] += [now] * len(output.token_ids)
            if output.finished:
                self.watched.ended.add(output.request_id)

    def until(self, done: Callable[[], bool]) -> None:
        while not done():
            self.step()

    def has_tokens(self, names: Sequence[str], count: int) -> bool:
        return all(len(self.watched.token_seconds[name]) > count for name in names)

    def more_tokens(self, names: Sequence[str], count: int) -> None:
        """Run steps until each of these requests has so many tokens more."""
        target = count + max(len(self.watched.token_seconds[name]) for name in names)
        self.until(lambda: self.has_tokens(names, target - 1))

    def timed(self, prefix: Sequence[int], tokens: int, *, ingest: bool = False) -> float:
        """Seconds until a prompt, with nothing beside it, is computed."""
        scheduler = self.engine.scheduler
        assert isinstance(scheduler, LoadScheduler)
        scheduler.let_pass(QUIET_SECONDS)
        began = time.perf_counter()
        name = self.submit(prefix, tokens, max_tokens=0 if ingest else 1, ingest=ingest)
        self.until(lambda: name in self.watched.ended)
        return time.perf_counter() - began

    @contextmanager
    def answers(self, count: int, prompt_tokens: int) -> Iterator[list[str]]:
        """Answers that are being written, each of some tokens already; they end with the block."""
        names = [self.submit((), prompt_tokens, max_tokens=ANSWER_TOKENS) for _ in range(count)]
        self.until(lambda: self.has_tokens(names, SETTLED_TOKENS))
        yield names
        for name in names:
            self.engine.abort(name)
        while self.engine.has_work:
            self.step()


def run(
    engine: EngineConfig, bench: BenchConfig, load: LoadConfig, *, say: Callable[[str], None]
) -> Report:
    """Measure every depth, chunked and not."""
    unchunked = replace(
        engine,
        scheduler=replace(
            engine.scheduler,
            max_batch_tokens=load.window_tokens + 2 * engine.scheduler.max_sequences,
        ),
    )
    with TemporaryDirectory(prefix="longctx-bench-") as temporary:
        folder = engine.model.model
        if folder is None:
            folder = Path(temporary)
            write_random_llama(folder, SIZES[load.load_model], seed=bench.seed)
        whole = _opened(unchunked, folder, load, bench.seed, UnchunkedScheduler)
        contrast = dict(_contrast(whole, load, say))
        del whole
        gc.collect()  # its pools, before the next one's
        loaded = _opened(engine, folder, load, bench.seed)
        found: list[AtDepth] = []
        for each in _depths(loaded, load, contrast, say):
            found.append(each)
            cells = zip(COLUMNS, _cells(each), strict=True)
            say(", ".join(f"{name} {cell}" for name, cell in cells))  # a depth may take minutes
    info = loaded.engine.info
    target = engine.scheduler.target_seconds(info.device)
    parameters: dict[str, Parameter] = {
        "model": info.model_name if engine.model.model else f"Llama {load.load_model}",
        "dtype": info.dtype,
        "device": info.device,
        "kv_codec": info.kv_codec,
        "threads": torch.get_num_threads(),
        "target_step_ms": 1000 * target,
        "answers": load.answers,
        "chat_tokens": load.chat_tokens,
        "window_tokens": load.window_tokens,
    }
    title = ", ".join(str(parameters[name]) for name in ("model", "dtype", "kv_codec", "device"))
    subtitle = f"{title}, {parameters['threads']} threads, objective {1000 * target:.0f} ms"
    return Report(
        results=tuple(_results(found, parameters)),
        tables=(_table(found, subtitle),),
        draw=partial(_draw, found, subtitle),
    )


def _opened(
    engine: EngineConfig,
    folder: Path,
    load: LoadConfig,
    seed: int,
    scheduler: type[LoadScheduler] = LoadScheduler,
) -> LoadedEngine:
    # Random weights hide what a codec costs, so none is measured
    codec = "int8" if engine.cache.kv_codec == "auto" else engine.cache.kv_codec
    cache = replace(engine.cache, kv_codec=codec, force_codec=True)
    measured = MeasuredEngine(replace(engine, cache=cache), folder, scheduler=scheduler)
    loaded = LoadedEngine(measured, max(load.every_depth), seed=seed)
    loaded.timed((), load.chat_tokens)  # warms up, and what a prompt costs becomes known
    loaded.timed((), load.window_tokens, ingest=True)
    return loaded


def _contrast(
    loaded: LoadedEngine, load: LoadConfig, say: Callable[[str], None]
) -> Iterator[tuple[int, tuple[Together, float]]]:
    for depth in load.every_depth:
        say(f"without chunks, at {depth:,}")
        alone = loaded.timed(loaded.document[:depth], load.window_tokens, ingest=True)
        yield depth, (_together(loaded, depth, load, parts=1), alone)


def _depths(
    loaded: LoadedEngine,
    load: LoadConfig,
    contrast: dict[int, tuple[Together, float]],
    say: Callable[[str], None],
) -> Iterator[AtDepth]:
    for depth in load.every_depth:
        say(f"in chunks, at {depth:,}")
        chat = min(loaded.timed((), load.chat_tokens) for _ in range(3))
        before = loaded.timed(loaded.document[:depth], load.window_tokens, ingest=True)
        together = _together(loaded, depth, load, parts=PARTS)
        after = loaded.timed(loaded.document[:depth], load.window_tokens, ingest=True)
        unchunked, unchunked_alone = contrast[depth]
        yield AtDepth(
            depth=depth,
            alone_chat_seconds=chat,
            alone_document_seconds=(before + after) / 2,
            window_tokens=load.window_tokens,
            chunked=together,
            unchunked=unchunked,
            unchunked_document_seconds=unchunked_alone,
            prediction_error=loaded.engine.prediction_error,
        )


def _together(loaded: LoadedEngine, depth: int, load: LoadConfig, *, parts: int) -> Together:
    """Compute the document in so many parts beside answers, a chat beside the first of them.

    Each part begins with new answers, which run alone before and after it.
    """
    watched = loaded.watched
    window = loaded.new_tokens(load.window_tokens)
    blocks = max(1, load.window_tokens // BLOCK_TOKENS // parts)
    ends = [*range(blocks * BLOCK_TOKENS, load.window_tokens, blocks * BLOCK_TOKENS)][: parts - 1]
    intervals: list[float] = []
    alone_intervals: list[float] = []
    chat_seconds = document_seconds = math.inf
    counted_seconds, counted_tokens = 0.0, 0
    alone_tokens = 3 * SETTLED_TOKENS
    for begin, end in itertools.pairwise((0, *ends, load.window_tokens)):
        with loaded.answers(load.answers, load.chat_tokens) as names:
            alone = _alone(loaded, names, alone_tokens)
            began = time.perf_counter()
            counts = len(watched.token_seconds[names[0]])
            prefix = (*loaded.document[:depth], *window[:begin])
            document = loaded.submit((*prefix, *window[begin:end]), 0, max_tokens=0, ingest=True)
            if begin == 0:
                chat_seconds = _chat_beside(loaded, names, counts, document, load)
            loaded.until(partial(watched.ended.__contains__, document))
            steps = len(watched.token_seconds[names[0]]) - counts
            document_seconds = time.perf_counter() - began
            intervals += watched.intervals(names, began)
            alone_tokens = max(alone_tokens, steps // 4)
            alone += _alone(loaded, names, alone_tokens)
            alone_intervals += alone
            if begin or parts == 1:
                counted_tokens += end - begin
                counted_seconds += document_seconds - steps * float(np.mean(alone))
    return Together(
        intervals=tuple(intervals),
        chat_seconds=chat_seconds,
        alone_intervals=tuple(alone_intervals),
        document_seconds_per_token=counted_seconds / max(counted_tokens, 1),
    )


def _alone(loaded: LoadedEngine, names: Sequence[str], tokens: int) -> list[float]:
    """Run answers alone; return the times between their tokens."""
    began = time.perf_counter()
    loaded.more_tokens(names, tokens)
    return loaded.watched.intervals(names, began)


def _chat_beside(
    loaded: LoadedEngine, names: Sequence[str], counts: int, document: str, load: LoadConfig
) -> float:
    """Let a chat come after the next token; return the seconds to its first one."""
    watched = loaded.watched
    loaded.until(lambda: loaded.has_tokens(names[:1], counts + 1) or document in watched.ended)
    came = time.perf_counter()
    chat = loaded.submit((), load.chat_tokens, max_tokens=1)
    loaded.until(lambda: chat in watched.ended)
    return watched.token_seconds[chat][1] - came


def _results(found: Sequence[AtDepth], parameters: dict[str, Parameter]) -> Iterator[Result]:
    for each in found:
        at: dict[str, Parameter] = {**parameters, "depth_tokens": each.depth}
        for percent in (50, 99):
            yield Result(
                metric=f"inter_token_p{percent}",
                value=_ms(each.chunked.intervals, percent),
                unit="ms",
                parameters={**at, "idle_ms": _ms(each.chunked.alone_intervals, percent)},
                baseline="without chunks",
                baseline_value=_ms(each.unchunked.intervals, percent),
            )
        yield Result(
            metric="chat_first_token",
            value=1000 * each.chunked.chat_seconds,
            unit="ms",
            parameters={**at, "idle_ms": 1000 * each.alone_chat_seconds},
            baseline="without chunks",
            baseline_value=1000 * each.unchunked.chat_seconds,
        )
        yield Result(
            metric="document_speed_kept", value=each.kept_speed, unit="of alone", parameters=at
        )
        yield Result(
            metric="document_alone",
            value=each.alone_document_seconds,
            unit="s",
            parameters=at,
            baseline="without chunks",
            baseline_value=each.unchunked_document_seconds,
        )
        if each.prediction_error is not None:
            yield Result(
                metric="prediction_error", value=each.prediction_error, unit="median", parameters=at
            )


def _ms(seconds: Sequence[float], percent: float) -> float:
    return 1000 * float(np.percentile(seconds, percent))


def _table(found: Sequence[AtDepth], subtitle: str) -> Table:
    table = Table(
        title="Answers beside a document; ms between tokens as p50 / p99, and without chunks",
        caption=f"{subtitle}; the document's speed beside answers, of its speed alone in the time "
        "that they leave; alone, of one chunk",
    )
    for name in COLUMNS:
        table.add_column(name, justify="right")
    for each in found:
        table.add_row(*_cells(each))
    return table


def _cells(each: AtDepth) -> tuple[str, ...]:
    return (
        f"{each.depth:,}",
        *(
            f"{_ms(seconds, 50):,.0f} / {_ms(seconds, 99):,.0f}"
            for seconds in (
                each.chunked.alone_intervals,
                each.chunked.intervals,
                each.unchunked.intervals,
            )
        ),
        f"{1000 * each.chunked.chat_seconds:,.0f}",
        f"{1000 * each.alone_chat_seconds:,.0f}",
        f"{100 * each.kept_speed:.0f}%",
        f"{100 * each.unchunked_document_seconds / each.alone_document_seconds:.0f}%",
        "" if each.prediction_error is None else f"{100 * each.prediction_error:.0f}%",
    )


def _draw(found: Sequence[AtDepth], subtitle: str, path: Path) -> None:
    draw_bars(
        path,
        title="Longest pauses of answers beside a document (p99)",
        subtitle=f"{subtitle}; logarithmic",
        groups=[f"at {each.depth:,} tokens" for each in found],
        series=[
            Series(label="in chunks", values=[_ms(e.chunked.intervals, 99) for e in found]),
            Series(label="without chunks", values=[_ms(e.unchunked.intervals, 99) for e in found]),
            Series(label="no document", values=[_ms(e.chunked.alone_intervals, 99) for e in found]),
        ],
        unit="ms",
        logarithmic=True,
    )
