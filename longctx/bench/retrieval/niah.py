"""Needles in haystacks: does the engine still find one sentence in a long document, at any depth?

Each document is read once and then asked once per needle, through the cache that serves users, so
what a codec or a reused prefix breaks shows here. An answer counts when it is the whole value,
character for character. Keys and values are words that training never draws.
Source: Greg Kamradt, https://github.com/gkamradt/LLMTest_NeedleInAHaystack
Differs: many needles per document (one question each), exact match instead of a judge.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

from rich.table import Table

from longctx.bench.config import BenchConfig, NiahConfig
from longctx.bench.haystack import Planted, haystacks
from longctx.bench.picture import draw_heat_map
from longctx.bench.report import Parameter, Report, Result
from longctx.bench.scores import matches, wilson
from longctx.bench.timing import Stopwatch
from longctx.config import EngineConfig
from longctx.llm import LLM, Document
from longctx.request import SamplingParams
from longctx.text.chat_template import ChatPrompts, FilePart, Message


@dataclass(slots=True)
class Cell:
    """What the questions of one length and depth came to."""

    asked: int = 0
    right: int = 0

    @property
    def share(self) -> float:
        return self.right / self.asked


@dataclass(slots=True)
class Reading:
    """What it took to read and ask the documents of one length."""

    documents: int = 0
    tokens: int = 0
    seconds: float = 0.0
    cached_tokens: list[int] = field(default_factory=list)  # per question
    computed_tokens: list[int] = field(default_factory=list)
    first_token_seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Grid:
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    cells: dict[tuple[int, float], Cell]
    readings: dict[int, Reading]

    @property
    def total(self) -> Cell:
        cells = self.cells.values()
        return Cell(sum(cell.asked for cell in cells), sum(cell.right for cell in cells))


def run(
    engine: EngineConfig, bench: BenchConfig, niah: NiahConfig, *, say: Callable[[str], None]
) -> Report:
    """Asks every question of the grid on one engine. Raises LongctxError."""
    llm = LLM(config=engine)
    grid = measure(llm, niah, seed=bench.seed, say=say)
    model = llm.engine.info.model_name
    codec = llm.engine.info.kv_codec
    subtitle = f"{model}, {codec} KV, {niah.kind} needles, {_share(grid.total)}"
    return Report(
        results=results(grid, {"model": model, "kv_codec": codec, "kind": niah.kind}),
        tables=(_grid_table(grid, subtitle), _reading_table(grid)),
        draw=partial(draw, grid, subtitle),
    )


def measure(llm: LLM, niah: NiahConfig, *, seed: int, say: Callable[[str], None]) -> Grid:
    """Asks every question of the grid."""
    grid = Grid(niah.token_lengths, niah.percent_depths, defaultdict(Cell), defaultdict(Reading))
    stopwatch = Stopwatch(llm.engine)
    prompts = ChatPrompts(llm.engine.tokenizer)
    encode = llm.engine.tokenizer.encode
    for length in grid.lengths:
        reading = grid.readings[length]
        for hay in haystacks(
            length,
            grid.depths,
            questions=niah.questions,
            kind=niah.kind,
            distractor_count=niah.distractors,
            seed=seed,
            count_tokens=lambda text: len(encode(text)),
        ):
            began = time.perf_counter()
            document = llm.document_from_text(hay.text)
            reading.seconds += time.perf_counter() - began
            reading.documents += 1
            reading.tokens += document.tokens
            for planted in hay.planted:
                right = _ask(document, planted, niah, prompts, stopwatch, reading)
                cell = grid.cells[length, planted.depth]
                cell.asked += 1
                cell.right += right
            document.close()
        row = [grid.cells[length, depth] for depth in grid.depths]
        found, asked = sum(cell.right for cell in row), sum(cell.asked for cell in row)
        say(f"{length:,} tokens: {found} of {asked} found")
    return grid


def _ask(
    document: Document,
    planted: Planted,
    niah: NiahConfig,
    prompts: ChatPrompts,
    stopwatch: Stopwatch,
    reading: Reading,
) -> bool:
    part = FilePart(document.part.document_id, document.part.title)
    began = time.perf_counter()
    segments = prompts.render([Message("user", (part, planted.needle.question))])
    rendered = time.perf_counter() - began
    sampling = SamplingParams(max_tokens=niah.answer_tokens, temperature=0.0)
    answer = stopwatch.ask(segments, sampling)
    reading.cached_tokens.append(answer.usage.cached_tokens)
    # Each token of the answer but the last is computed too, to draw the next one
    reading.computed_tokens.append(
        answer.usage.computed_tokens - answer.usage.completion_tokens + 1
    )
    reading.first_token_seconds.append(rendered + answer.first_token_seconds)
    return matches(answer.text, planted.needle.answer, niah.match)


def results(grid: Grid, parameters: Mapping[str, Parameter]) -> tuple[Result, ...]:
    rows = [_exact_match(grid.total, parameters)]
    for length in grid.lengths:
        for depth in grid.depths:
            cell = grid.cells[length, depth]
            place = {"length_tokens": length, "depth_percent": depth}
            rows.append(_exact_match(cell, {**parameters, **place}))
        reading = grid.readings[length]
        at = {**parameters, "length_tokens": length}
        for metric, value, unit in (
            ("documents read", reading.documents, "documents"),
            ("reading", reading.seconds / reading.documents, "s/document"),
            ("reading rate", reading.tokens / reading.seconds, "tokens/s"),
            ("cached tokens per question", median(reading.cached_tokens), "tokens"),
            ("prompt tokens computed per question", max(reading.computed_tokens), "tokens"),
            ("time to first token", median(reading.first_token_seconds), "s"),
        ):
            rows.append(Result(metric=metric, value=value, unit=unit, parameters=at))
    return tuple(rows)


def _exact_match(cell: Cell, parameters: Mapping[str, Parameter]) -> Result:
    low, high = wilson(cell.right, cell.asked)
    interval = {"n": cell.asked, "low": round(low, 4), "high": round(high, 4)}
    return Result(
        metric="exact match", value=cell.share, unit="share", parameters={**parameters, **interval}
    )


def draw(grid: Grid, subtitle: str, path: Path) -> None:
    draw_heat_map(
        path,
        title="Needles found in long documents",
        subtitle=subtitle,
        columns=[_tokens(length) for length in grid.lengths],
        rows=[f"{depth:g}%" for depth in grid.depths],
        shares=[
            [grid.cells[length, depth].share for length in grid.lengths] for depth in grid.depths
        ],
        notes=[
            [f"{cell.right} of {cell.asked}" for cell in _row(grid, depth)] for depth in grid.depths
        ],
        column_label="length of the document, tokens",
        row_label="depth of the needle",
    )


def _row(grid: Grid, depth: float) -> list[Cell]:
    return [grid.cells[length, depth] for length in grid.lengths]


def _grid_table(grid: Grid, subtitle: str) -> Table:
    table = Table(title="Needles found", caption=subtitle, caption_justify="left")
    table.add_column("depth", justify="right")
    for length in grid.lengths:
        table.add_column(f"{length:,} tokens", justify="center")
    for depth in grid.depths:
        table.add_row(f"{depth:g}%", *(_interval(cell) for cell in _row(grid, depth)))
    return table


def _reading_table(grid: Grid) -> Table:
    table = Table(title="What it took", caption="tokens, but for times; computed: at most")
    for name in ("document", "read once", "per second", "first token", "cached", "computed"):
        table.add_column(name, justify="right")
    for length in grid.lengths:
        reading = grid.readings[length]
        table.add_row(
            f"{length:,}",
            f"{reading.seconds / reading.documents:.2f} s",
            f"{reading.tokens / reading.seconds:,.0f}",
            f"{1000 * median(reading.first_token_seconds):.0f} ms",
            f"{median(reading.cached_tokens):,.0f}",
            f"{max(reading.computed_tokens):,}",
        )
    return table


def _interval(cell: Cell) -> str:
    low, high = wilson(cell.right, cell.asked)
    return f"{100 * cell.share:3.0f}%  [dim]{100 * low:.0f} to {100 * high:.0f}[/]"


def _share(cell: Cell) -> str:
    low, high = wilson(cell.right, cell.asked)
    return (
        f"{cell.right} of {cell.asked} found: {100 * cell.share:.1f}% "
        f"(95% interval {100 * low:.1f} to {100 * high:.1f}%)"
    )


def _tokens(count: int) -> str:
    return f"{count // 1024}k" if count % 1024 == 0 else f"{count:,}"
