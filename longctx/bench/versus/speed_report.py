"""What `speed.py` measured, as results, tables and a picture."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from statistics import median

from rich.table import Table

from longctx.bench.picture import Series, draw_bars
from longctx.bench.report import Parameter, Result
from longctx.bench.versus.speed import Measured, Questions, Speed, middle, same_tokens

OWN = "longctx"
MIB = 1 << 20
Figure = Callable[[Measured], float | None]


def _of_length(length: int, pick: Callable[[Speed], list[float]], each: Measured) -> float | None:
    speed = each.speeds.get(length)
    return None if speed is None else middle(pick(speed))


def _of_questions(pick: Callable[[Questions], float | None], each: Measured) -> float | None:
    return None if each.questions is None else pick(each.questions)


def _mib(count: int | None) -> float | None:
    return None if count is None else count / MIB


def _figures(found: Mapping[str, Measured]) -> Iterator[tuple[str, int, str, Figure]]:
    """Yield metric, prompt length, unit and how to get it, of what should be small."""
    own = found[OWN]
    for length in own.speeds:
        yield "prefill", length, "s", partial(_of_length, length, lambda speed: speed.prefill)
    for length in own.speeds:
        yield (
            "decode",
            length,
            "ms/token",
            partial(_of_length, length, lambda speed: [1000 * each for each in speed.interval]),
        )
    if own.questions is None:
        return
    picks: tuple[tuple[str, str, Callable[[Questions], float | None]], ...] = (
        ("first question", "s", lambda asked: asked.cold),
        ("another question", "s", lambda asked: middle(asked.warm)),
        ("another after a restart", "s", lambda asked: middle(asked.restored)),
        ("stored", "MiB", lambda asked: _mib(asked.stored_bytes)),
        ("peak memory", "MiB", lambda asked: _mib(asked.peak_bytes)),
    )
    for metric, unit, pick in picks:
        yield metric, own.questions.tokens, unit, partial(_of_questions, pick)


def speed_results(
    found: Mapping[str, Measured], common: Mapping[str, Parameter]
) -> Iterator[Result]:
    """Yield each figure against each rival that has it; without one, by itself."""
    rivals = [name for name in found if name != OWN]
    about = found[OWN].about
    at = {**common, "dtype": str(about["dtype"]), "kv_codec": str(about["kv"])}
    for metric, length, unit, figure in _figures(found):
        value = figure(found[OWN])
        if value is None:
            continue
        parameters = {**at, "context_tokens": length}
        against = [(name, figure(found[name])) for name in rivals]
        compared = [(name, other) for name, other in against if other is not None]
        if not compared:
            yield Result(metric=metric, value=value, unit=unit, parameters=parameters)
        for name, other in compared:
            yield Result(
                metric=metric,
                value=value,
                unit=unit,
                parameters={**parameters, "rival": str(found[name].about["engine"])},
                baseline=name,
                baseline_value=other,
            )
    for name in rivals:
        for length, speed in found[name].speeds.items():
            yield Result(
                metric="same tokens",
                value=same_tokens(found[OWN].speeds[length], speed),
                unit="share",
                parameters={**at, "context_tokens": length, "rival": name},
            )


def speed_tables(found: Mapping[str, Measured], common: Mapping[str, Parameter]) -> list[Table]:
    """Make one table of all engines; failures are in its caption."""
    rivals = [name for name in found if name != OWN]
    caption = [f"{common['model']}, {common['threads']} threads; above 1x longctx is better"]
    caption += [
        f"{name}: {each.about['engine']}, KV {each.about['kv']}"
        for name, each in found.items()
        if each.about
    ]
    caption += [f"{name} failed: {each.failure}" for name, each in found.items() if each.failure]
    table = Table(title="One sequence", caption="\n".join(caption))
    for column in ("", "prompt", OWN, *rivals):
        table.add_column(column, justify="right")
    for metric, length, unit, figure in _figures(found):
        own = figure(found[OWN])
        cells = ["-" if own is None else _shown(own, unit)]
        for name in rivals:
            other = figure(found[name])
            ratio = f" {other / own:.2f}x" if other is not None and own else ""
            cells.append("-" if other is None else _shown(other, unit) + ratio)
        table.add_row(metric, f"{length:,}", *cells)
    return [table]


def _shown(value: float, unit: str) -> str:
    digits = 3 if unit == "s" else 1 if unit == "ms/token" else 0
    return f"{value:,.{digits}f} {unit}"


def draw_speeds(found: Mapping[str, Measured], common: Mapping[str, Parameter], path: Path) -> None:
    """Draw the time per decoded token of every engine."""
    lengths = list(found[OWN].speeds)
    draw_bars(
        path,
        title="Time per decoded token",
        subtitle=f"{common['model']}, {common['threads']} threads",
        groups=[f"after {length:,}" for length in lengths],
        series=[
            Series(
                label=name,
                values=[
                    1000 * median(each.speeds[length].interval) if length in each.speeds else None
                    for length in lengths
                ],
            )
            for name, each in found.items()
            if each.speeds
        ],
        unit="ms",
    )
