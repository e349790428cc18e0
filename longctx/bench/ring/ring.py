"""What it costs to share a prompt among ranks: time, bytes, waiting, balance; and a projection.

Virtual ranks are threads that share this machine's cores: their bytes and balance are exact, their
times only show what the split adds. Ranks that are processes (gloo) are timed for real, on the same
cores, with one share of the threads each. The projection is arithmetic (`projection.py`).
"""

import asyncio
import os
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

from rich.table import Table

from longctx.bench.config import BenchConfig, RanksConfig
from longctx.bench.picture import Series, draw_bars
from longctx.bench.random_model import SIZES, VOCABULARY, write_random_llama
from longctx.bench.report import Parameter, Report, Result
from longctx.bench.ring.processes import read_prompt, started_engine
from longctx.bench.ring.projection import (
    GPU_FLOP_PER_SECOND,
    LINKS,
    MODELS,
    Projection,
    project,
)
from longctx.bench.ring.virtual import Chunk, chunks
from longctx.config import EngineConfig, KVCodec
from longctx.engine_stats import RingStats

PIECE_TOKENS = 2048  # of the prompt, read by each number of processes in turn
PROJECTED_TOKENS = (1 << 17, 1 << 20)
PROJECTED_GPUS = (2, 8, 32, 128)


@dataclass(frozen=True, slots=True, kw_only=True)
class Processes:
    """What the whole prompt took over ranks that are processes."""

    ranks: int
    seconds: float
    sent_bytes: float
    waited_seconds: float  # by rank 0
    transfer_seconds: float  # that a rank's bytes would take if nothing hid them

    @property
    def overlap(self) -> float:
        """The share of the transfers that was hidden; waiting for late peers counts against it."""
        return max(0.0, 1 - self.waited_seconds / self.transfer_seconds)


def run(
    engine: EngineConfig, bench: BenchConfig, ranks: RanksConfig, *, say: Callable[[str], None]
) -> Report:
    """Measures virtual ranks, then ranks that are processes, and projects to many GPUs."""
    chance = random.Random(bench.seed)
    cores = engine.model.threads or os.cpu_count() or 1
    prompt = tuple(chance.randrange(VOCABULARY) for _ in range(ranks.tokens))
    codec = "raw" if engine.cache.kv_codec == "auto" else engine.cache.kv_codec
    engine = replace(
        engine,
        cache=replace(engine.cache, kv_codec=codec, force_codec=True),
        scheduler=replace(engine.scheduler, max_batch_tokens=ranks.chunk_tokens),
    )
    virtual: dict[int, list[Chunk]] = {}
    with tempfile.TemporaryDirectory(prefix="longctx-ring-") as name:
        folder = Path(name)
        write_random_llama(folder, SIZES[ranks.model_size], seed=bench.seed)
        config = replace(engine, model=replace(engine.model, model=folder))
        for count in ranks.every_rank_count:
            say(f"{count} virtual ranks")
            virtual[count] = list(chunks(config, folder, count, prompt))
        say("processes")
        counts = ranks.every_rank_count
        processes = asyncio.run(_processes(folder, codec, counts, cores, list(prompt)))
    projections = [
        project(model, link, tokens, gpus, flop_per_second=GPU_FLOP_PER_SECOND)
        for model in MODELS
        for link in LINKS
        for tokens in PROJECTED_TOKENS
        for gpus in PROJECTED_GPUS
        if gpus >= model.gpus
    ]
    shared: dict[str, Parameter] = {
        "size": ranks.model_size,
        "tokens": ranks.tokens,
        "chunk_tokens": ranks.chunk_tokens,
        "codec": codec,
        "cores": cores,
    }
    return Report(
        results=tuple(_results(virtual, processes, projections, shared)),
        tables=(
            _virtual_table(virtual),
            _process_table(processes),
            _projection_table(projections),
        ),
        draw=partial(_draw, processes, f"{ranks.tokens:,} tokens, {ranks.model_size}, {codec}"),
    )


async def _processes(
    folder: Path, codec: KVCodec, counts: Sequence[int], cores: int, prompt: list[int]
) -> list[Processes]:
    """Piece by piece, by turns: a machine that gets slower for a while slows all alike."""
    async with AsyncExitStack() as stack:
        engines = [
            await stack.enter_async_context(started_engine(folder, codec, ranks=count, cores=cores))
            for count in counts
        ]
        for engine in engines:
            await read_prompt(engine, prompt[::-1][:1024])  # warms up
        before = [(await engine.stats()).ring for engine in engines]
        seconds = [0.0] * len(engines)
        turn = list(enumerate(engines))
        for end in (*range(PIECE_TOKENS, len(prompt), PIECE_TOKENS), len(prompt)):
            for index, engine in turn:
                seconds[index] += await read_prompt(engine, prompt[:end])
            turn.reverse()
        after = [(await engine.stats()).ring for engine in engines]
    return [_process_figures(*each) for each in zip(counts, seconds, before, after, strict=True)]


def _process_figures(
    ranks: int, seconds: float, before: RingStats | None, after: RingStats | None
) -> Processes:
    if before is None or after is None:  # one rank
        return Processes(
            ranks=ranks, seconds=seconds, sent_bytes=0, waited_seconds=0, transfer_seconds=0
        )
    sent = after.sent_bytes - before.sent_bytes
    return Processes(
        ranks=ranks,
        seconds=seconds,
        sent_bytes=sent,
        waited_seconds=after.wait_seconds - before.wait_seconds,
        transfer_seconds=sent / ranks / after.link_bytes_per_second,
    )


def _results(
    virtual: Mapping[int, Sequence[Chunk]],
    processes: Sequence[Processes],
    projections: Sequence[Projection],
    shared: dict[str, Parameter],
) -> Iterator[Result]:
    def result(metric: str, value: float, unit: str, **more: Parameter) -> Result:
        return Result(metric=metric, value=value, unit=unit, parameters={**shared, **more})

    for ranks, read in virtual.items():
        of: dict[str, Parameter] = {"ranks": ranks, "transport": "virtual"}
        yield result("chunk_seconds", median(chunk.seconds for chunk in read), "s", **of)
        yield result("sent_bytes", sum(chunk.sent_bytes for chunk in read), "B", **of)
        yield result("formula_bytes", sum(chunk.formula_bytes for chunk in read), "B", **of)
        yield result("load_max_by_mean", max(chunk.balance for chunk in read), "", **of)
    for each in processes:
        of = {"ranks": each.ranks, "transport": "gloo"}
        yield result("prefill_seconds", each.seconds, "s", **of)
        if each.ranks > 1:
            yield result("sent_bytes", each.sent_bytes, "B", **of)
            yield result("waited_seconds", each.waited_seconds, "s", **of)
            yield result("overlap", each.overlap, "", **of)
    for projected in projections:
        what: dict[str, Parameter] = {
            "model": projected.model,
            "link": projected.link,
            "gpus": projected.gpus,
            "tokens": projected.tokens,
        }
        for metric, value, unit in (
            ("projected_seconds", projected.seconds, "s"),
            ("projected_efficiency", projected.efficiency, ""),
        ):
            yield Result(metric=metric, value=value, unit=unit, parameters=what)


def _virtual_table(virtual: Mapping[int, Sequence[Chunk]]) -> Table:
    table = Table(title="Virtual ranks: bytes and balance are exact", title_justify="left")
    for name in ("ranks", "tokens before", "chunk, s", "sent, MB", "formula, MB", "max/mean"):
        table.add_column(name, justify="right")
    for ranks, read in virtual.items():
        for chunk in read:
            table.add_row(
                str(ranks),
                f"{chunk.end:,}",
                f"{chunk.seconds:.2f}",
                f"{chunk.sent_bytes / 1e6:.2f}",
                f"{chunk.formula_bytes / 1e6:.2f}",
                f"{chunk.balance:.3f}",
            )
    return table


def _process_table(processes: Sequence[Processes]) -> Table:
    table = Table(title="Processes on the same cores (gloo)", title_justify="left")
    for name in ("ranks", "prefill, s", "sent, MB", "rank 0 waited, s", "hidden"):
        table.add_column(name, justify="right")
    for each in processes:
        table.add_row(
            str(each.ranks),
            f"{each.seconds:.2f}",
            f"{each.sent_bytes / 1e6:.1f}",
            f"{each.waited_seconds:.2f}" if each.ranks > 1 else "",
            f"{each.overlap:.0%}" if each.ranks > 1 else "",
        )
    return table


def _projection_table(projections: Sequence[Projection]) -> Table:
    table = Table(
        title="PROJECTION, not measured: prefill seconds (efficiency) at 540 TFLOP/s a GPU\n"
        "Published: 405B, 1M tokens, 128 H100: 77 s, 93% (arXiv 2411.01783); "
        "zigzag on 8 H800: 85%",
        title_justify="left",
    )
    for name in ("model", "link", "tokens", *(f"{gpus} GPUs" for gpus in PROJECTED_GPUS)):
        table.add_column(name, justify="right")
    rows: dict[tuple[str, str, int], dict[int, Projection]] = {}
    for each in projections:
        rows.setdefault((each.model, each.link, each.tokens), {})[each.gpus] = each
    for (model, link, tokens), by_gpus in rows.items():
        cells = [
            f"{by_gpus[gpus].seconds:.1f} ({by_gpus[gpus].efficiency:.0%})"
            if gpus in by_gpus
            else ""
            for gpus in PROJECTED_GPUS
        ]
        table.add_row(model, link, f"{tokens:,}", *cells)
    return table


def _draw(processes: Sequence[Processes], subtitle: str, path: Path) -> None:
    draw_bars(
        path,
        title="Reading a prompt over ranks on the same cores",
        subtitle=subtitle,
        groups=[f"{each.ranks} ranks" for each in processes],
        series=[Series(label="prefill", values=[each.seconds for each in processes])],
        unit="s",
    )
