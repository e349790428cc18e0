"""What a document costs after a restart: read back from disk instead of computed.

- cold: a question on a document that nobody has read.
- warm: another question, the document on the device.
- restored: the first question after a restart; the files are read from the disk itself (their
  pages were dropped from memory) and, beside it, from the page cache. A new engine in this process
  takes the place of a restarted server: it knows the document by its tokens alone.
- raw read: the same files read one after another by plain reads, also from the disk itself.
- stored: bytes on disk per token, against what the global (full-attention) layers need.
- cold with and without a store: what writing through costs a prefill.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
from rich.table import Table

from longctx.bench.config import BenchConfig, DocumentConfig, RestartConfig, RoundsConfig
from longctx.bench.picture import Series, draw_first_tokens
from longctx.bench.random_model import SIZES, write_random_llama
from longctx.bench.report import Parameter, Report, Result, model_parameters
from longctx.bench.timing import Stopwatch
from longctx.config import EngineConfig
from longctx.embedded import model_path
from longctx.engine_info import EngineInfo
from longctx.llm import LLM
from longctx.request import SamplingParams, Segment

FIRST_TOKEN = SamplingParams(max_tokens=1, temperature=0.0)
READ_BYTES = 4 << 20
DOCUMENT = "document"
QUESTION_TOKENS = 32
FLUSH_SECONDS = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Restart:
    """What one document cost. Lists have an entry per round, in seconds."""

    tokens: int
    stored_bytes: int
    global_bytes: int  # of the global (full-attention) layers
    cold: list[float]
    cold_without: list[float]  # without a store
    warm: list[float]
    restored: list[float]  # from the disk
    cached: list[float]  # from the page cache
    raw_read: list[float]


def run(
    engine: EngineConfig,
    bench: BenchConfig,
    rounds: RoundsConfig,
    documents: DocumentConfig,
    restart: RestartConfig,
    *,
    say: Callable[[str], None],
) -> Report:
    """Measures a document of each length over engines that are opened one after another."""
    # Beside the user's folder if one is named: another disk is another measurement
    with TemporaryDirectory(dir=engine.cache.kv_dir) as scratch:
        folder = engine.model.model or model_path()
        if restart.random_model is not None:
            folder = Path(scratch) / "model"
            write_random_llama(folder, SIZES[restart.random_model], seed=bench.seed)
        config = replace(
            engine,
            model=replace(engine.model, model=folder),
            cache=replace(engine.cache, kv_dir=Path(scratch) / "kv"),
        )
        measured = []
        for tokens in documents.token_lengths:
            measured.append(_Restarts(config, tokens, bench.seed).measure(rounds.rounds))
            say(f"document of {measured[-1].tokens:,} tokens done")
        with opened(config) as llm:
            parameters = model_parameters(llm.engine.info)
    parameters["model"] = restart.random_model or parameters["model"]
    subtitle = ", ".join(parameters.values())
    return Report(
        results=tuple(row for each in measured for row in _results(each, parameters)),
        tables=(_table(measured, subtitle),),
        draw=partial(_draw, measured, subtitle),
    )


class _Restarts:
    """Opens engines of one configuration, one after another, and asks each about one document.

    Only one engine exists at a time; `measure` takes all rounds and leaves the files in place.
    """

    def __init__(self, config: EngineConfig, tokens: int, seed: int) -> None:
        assert config.cache.kv_dir is not None
        self._config = config
        self._kv_dir = config.cache.kv_dir
        self._rng = np.random.default_rng(seed)
        with opened(config) as llm:
            self._info: EngineInfo = llm.engine.info
        # What the document says makes no difference to what it costs
        self._token_ids = self._random_ids(tokens)

    def measure(self, rounds: int) -> Restart:
        plain = replace(self._config, cache=replace(self._config.cache, kv_dir=None))
        cold: list[float] = []
        cold_without: list[float] = []
        warm: list[float] = []
        for number in range(rounds):
            turns = [(plain, cold_without), (self._config, cold)]
            for config, found in reversed(turns) if number % 2 else turns:
                self._forget()
                with opened(config) as llm:
                    llm.generate("a", FIRST_TOKEN)  # the first answer of an engine is always slow
                    found.append(self._ask(llm))
                    if config is self._config:
                        warm.append(self._ask(llm))
        if not self._files():  # the last turn was without a store
            with opened(self._config) as llm:
                self._ask(llm)
        restored: list[float] = []
        cached: list[float] = []
        raw_read: list[float] = []
        for _ in range(rounds):
            drop_from_memory(self._files())
            raw_read.append(_read_all(self._files()))
            drop_from_memory(self._files())
            for found in (restored, cached):
                with opened(self._config) as llm:
                    llm.generate("a", FIRST_TOKEN)
                    found.append(self._ask(llm))
        return Restart(
            tokens=len(self._token_ids),
            stored_bytes=sum(file.stat().st_size for file in self._files()),
            global_bytes=len(self._token_ids)
            // self._info.block_tokens
            * self._info.kv_block_bytes,
            cold=cold,
            cold_without=cold_without,
            warm=warm,
            restored=restored,
            cached=cached,
            raw_read=raw_read,
        )

    def _ask(self, llm: LLM) -> float:
        """Returns the seconds to the first token of another question on the document."""
        llm.engine.open_document(DOCUMENT, self._token_ids)
        question = tuple(self._random_ids(QUESTION_TOKENS).tolist())
        segments = (Segment(document_id=DOCUMENT), Segment(token_ids=question))
        return Stopwatch(llm.engine).ask(segments, FIRST_TOKEN).first_token_seconds

    def _random_ids(self, tokens: int) -> "np.ndarray[tuple[int, ...], np.dtype[np.int32]]":
        return self._rng.integers(3, self._info.vocab_size, tokens).astype(np.int32)

    def _files(self) -> list[Path]:
        return sorted(self._kv_dir.glob("*.kv"))

    def _forget(self) -> None:
        for file in self._files():
            file.unlink()


@contextmanager
def opened(config: EngineConfig) -> Iterator[LLM]:
    llm = LLM(config=config)
    try:
        yield llm
    finally:
        llm.close(flush_seconds=FLUSH_SECONDS)


def drop_from_memory(files: Sequence[Path]) -> None:
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)  # pages that are not on the disk yet would stay
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _read_all(files: Sequence[Path]) -> float:
    buffer = bytearray(READ_BYTES)
    began = time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.perf_counter() - began


def _results(each: Restart, model: dict[str, str]) -> Iterator[Result]:
    parameters: dict[str, Parameter] = {
        **model,
        "document_tokens": each.tokens,
        "rounds": len(each.cold),
    }
    cold, warm = median(each.cold), median(each.warm)
    restored, raw_read = median(each.restored), median(each.raw_read)
    for metric, value, baseline, baseline_value in (
        ("cold first token", cold, "without a store", median(each.cold_without)),
        ("warm first token", warm, "cold", cold),
        ("restored first token", restored, "cold", cold),
        ("restored first token, from the page cache", median(each.cached), "cold", cold),
        ("restored beyond warm", restored - warm, "plain read of the same files", raw_read),
    ):
        yield Result(
            metric=metric,
            value=value,
            unit="s",
            parameters=parameters,
            baseline=baseline,
            baseline_value=baseline_value,
        )
    yield Result(
        metric="stored",
        value=each.stored_bytes / each.tokens,
        unit="bytes/token",
        parameters=parameters,
        baseline="global (full-attention) layers",
        baseline_value=each.global_bytes / each.tokens,
    )


def _table(measured: Sequence[Restart], subtitle: str) -> Table:
    table = Table(title="First token of a question, before and after a restart", caption=subtitle)
    columns = ("document", "cold", "without store", "warm", "restored", "faster", "page cache")
    for name in (*columns, "plain read", "stored"):
        table.add_column(name, justify="right")
    for each in measured:
        cold, restored = median(each.cold), median(each.restored)
        table.add_row(
            f"{each.tokens:,}",
            f"{cold:.2f} s",
            f"{median(each.cold_without):.2f} s",
            f"{1000 * median(each.warm):.0f} ms",
            f"{1000 * restored:.0f} ms",
            f"{cold / restored:,.0f}x",
            f"{1000 * median(each.cached):.0f} ms",
            f"{1000 * median(each.raw_read):.0f} ms",
            f"{each.stored_bytes / 1e6:,.0f} MB, {each.stored_bytes / each.global_bytes:.2f}x",
        )
    return table


def _draw(measured: Sequence[Restart], subtitle: str, path: Path) -> None:
    draw_first_tokens(
        path,
        subtitle=subtitle,
        lengths=[each.tokens for each in measured],
        series=(
            Series(label="warm", values=[median(each.warm) for each in measured]),
            Series(label="restored from disk", values=[median(e.restored) for e in measured]),
            Series(label="cold", values=[median(each.cold) for each in measured]),
        ),
    )
