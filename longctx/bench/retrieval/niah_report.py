"""A needle grid for people and scripts: tables, flat results, a heat map."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median

from rich.table import Table

from longctx.bench.config import NiahConfig
from longctx.bench.picture import draw_heat_map
from longctx.bench.report import Parameter, Result
from longctx.bench.retrieval.grid import LEAST_SHARE, Cell, Grid
from longctx.bench.retrieval.variants import (
    Variant,
    difference,
    difference_results,
    difference_table,
)

Grids = Mapping[Variant, Grid]


def results(
    grids: Grids, niah: NiahConfig, parameters: Mapping[str, Parameter]
) -> Iterator[Result]:
    """Yields each variant's shares, in all and by cell, and what it cost; then the differences."""
    base, *others = grids
    for variant, grid in grids.items():
        told = {**parameters, **variant.told}
        yield _exact_match(grid.cell(), told)
        for length in niah.token_lengths:
            for depth in niah.percent_depths:
                place = {"length_tokens": length, "depth_percent": depth}
                row = _exact_match(grid.cell(length, depth), {**told, **place})
                if others:
                    tells = _tells(grids[base].cell(length, depth))
                    row = _with(row, {"discriminates": tells})
                yield row
            yield from _costs(grid, length, {**told, "length_tokens": length})
    for variant in others:
        told = {**parameters, **variant.told}
        found = difference(grids[base].answers, grids[variant].answers)
        yield from difference_results(found, {**told, "base": str(base)})


def tables(grids: Grids, niah: NiahConfig, subtitle: str) -> Iterator[Table]:
    """Yields the grid of the first variant, what reading took, and how the others differ."""
    base, *others = grids
    yield _grid_table(
        grids[base], niah, f"{subtitle}, {base} KV, {_share(grids[base].cell())}", bool(others)
    )
    yield _reading_table(grids, niah)
    if others:
        answers = {variant: grid.answers for variant, grid in grids.items()}
        yield difference_table(answers, "needles")
        yield _losses_table(grids, niah)


def draw(grids: Grids, niah: NiahConfig, subtitle: str, path: Path) -> None:
    """Draws depth by length; of several variants, each of them by length."""
    lengths = niah.token_lengths
    if len(grids) == 1:
        ((variant, grid),) = grids.items()
        rows = [f"{depth:g}%" for depth in niah.percent_depths]
        cells = [[grid.cell(length, depth) for length in lengths] for depth in niah.percent_depths]
        subtitle, label = f"{subtitle}, {variant} KV, {_share(grid.cell())}", "depth of the needle"
    else:
        rows = [str(variant) for variant in grids]
        cells = [[grid.cell(length) for length in lengths] for grid in grids.values()]
        label = "KV and where it was"
    draw_heat_map(
        path,
        title="Needles found in long documents",
        subtitle=subtitle,
        columns=[_tokens(length) for length in lengths],
        rows=rows,
        shares=[[cell.share for cell in row] for row in cells],
        notes=[[f"of {cell.asked}, {_percent(cell)}%" for cell in row] for row in cells],
        column_label="length of the document, tokens",
        row_label=label,
    )


def _tells(cell: Cell) -> bool:
    """Whether losses could show: the exact model finds at least half."""
    return cell.share >= LEAST_SHARE


def _with(result: Result, more: Mapping[str, Parameter]) -> Result:
    return Result(
        metric=result.metric,
        value=result.value,
        unit=result.unit,
        parameters={**result.parameters, **more},
    )


def _exact_match(cell: Cell, parameters: Mapping[str, Parameter]) -> Result:
    low, high = cell.interval
    interval = {"n": cell.asked, "low": round(low, 4), "high": round(high, 4)}
    return Result(
        metric="exact match", value=cell.share, unit="share", parameters={**parameters, **interval}
    )


def _costs(grid: Grid, length: int, at: Mapping[str, Parameter]) -> Iterator[Result]:
    reading = grid.readings[length]
    figures: list[tuple[str, float, str]] = []
    if reading.documents:
        figures += [
            ("documents read", reading.documents, "documents"),
            ("reading", reading.seconds / reading.documents, "s/document"),
            ("reading rate", reading.tokens / reading.seconds, "tokens/s"),
            ("cached tokens per document", median(reading.found_tokens), "tokens"),
        ]
    figures += [
        ("farthest needle from its place", grid.most_missed_tokens(length), "tokens"),
        ("cached tokens per question", median(reading.cached_tokens), "tokens"),
        ("prompt tokens computed per question", max(reading.computed_tokens), "tokens"),
        ("time to first token", median(reading.first_token_seconds), "s"),
    ]
    for metric, value, unit in figures:
        yield Result(metric=metric, value=value, unit=unit, parameters=at)


def _grid_table(grid: Grid, niah: NiahConfig, subtitle: str, compared: bool) -> Table:
    cells = [
        [grid.cell(length, depth) for length in niah.token_lengths] for depth in niah.percent_depths
    ]
    blind = compared and any(not _tells(cell) for row in cells for cell in row)
    note = "; *: found by less than half, so no loss would show" if blind else ""
    missed = f"; needles begin within {grid.most_missed_tokens()} tokens of the wanted one"
    table = Table(title="Needles found", caption=subtitle + missed + note, caption_justify="left")
    table.add_column("depth", justify="right")
    for length in niah.token_lengths:
        table.add_column(f"{length:,} tokens", justify="center")
    for depth, row in zip(niah.percent_depths, cells, strict=True):
        marks = ["*" if compared and not _tells(cell) else "" for cell in row]
        table.add_row(
            f"{depth:g}%",
            *(f"{_interval(cell)}{mark}" for cell, mark in zip(row, marks, strict=True)),
        )
    return table


def _losses_table(grids: Grids, niah: NiahConfig) -> Table:
    """Tell at which lengths and depths needles are lost that the first variant finds."""
    base, *others = grids
    note = "lost and gained against it; *: found by less than half in it, so no loss would show"
    table = Table(title=f"Where {base} finds more", caption=note, caption_justify="left")
    for name in ("KV", "document", *(f"{depth:g}%" for depth in niah.percent_depths)):
        table.add_column(name, justify="right", no_wrap=name == "KV")
    for variant in others:
        for length in niah.token_lengths:
            cells = []
            for depth in niah.percent_depths:
                asked = grids[base].at(length, depth)
                found = difference(asked, grids[variant].answers)
                mark = "" if _tells(grids[base].cell(length, depth)) else "*"
                changed = f"-{found.lost} +{found.gained}" if found.lost + found.gained else "0"
                cells.append(changed + mark)
            table.add_row(str(variant), f"{length:,}", *cells)
    return table


def _reading_table(grids: Grids, niah: NiahConfig) -> Table:
    table = Table(title="What it took", caption="tokens, but for times; computed: at most")
    several = len(grids) > 1
    for name in (*(("KV",) if several else ()), "document", "read once", "per second",
                 "first token", "cached", "computed"):  # fmt: skip
        table.add_column(name, justify="right", no_wrap=name == "KV")
    for variant, grid in grids.items():
        for length in niah.token_lengths:
            reading = grid.readings[length]
            read = ("", "")
            if reading.documents:
                seconds = reading.seconds / reading.documents
                read = (f"{seconds:.2f} s", f"{reading.tokens / reading.seconds:,.0f}")
            table.add_row(
                *((str(variant),) if several else ()),
                f"{length:,}",
                *read,
                f"{1000 * median(reading.first_token_seconds):.0f} ms",
                f"{median(reading.cached_tokens):,.0f}",
                f"{max(reading.computed_tokens):,}",
            )
    return table


def _interval(cell: Cell) -> str:
    low, high = cell.interval
    return f"{100 * cell.share:3.0f}%  [dim]{100 * low:.0f} to {100 * high:.0f}[/]"


def _percent(cell: Cell) -> str:
    low, high = cell.interval
    return f"{100 * low:.0f} to {100 * high:.0f}"


def _share(cell: Cell) -> str:
    low, high = cell.interval
    return (
        f"{cell.right} of {cell.asked} found: {100 * cell.share:.1f}% "
        f"(95% interval {100 * low:.1f} to {100 * high:.1f}%)"
    )


def _tokens(count: int) -> str:
    return f"{count // 1024}k" if count % 1024 == 0 else f"{count:,}"
