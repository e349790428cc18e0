"""What the benchmark of modules found: rows for scripts, tables and a picture for people."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from rich.table import Table

from longctx.bench.config import ModulesConfig
from longctx.bench.picture import Series, draw_bars, draw_heat_map
from longctx.bench.report import Parameter, Result
from longctx.engine_info import PARTS, Verdict
from longctx.needles.scores import wilson
from prompt_cache.level import EXACT, Level

TASKS = {"needle": 0, "multi-key": 3}  # how many others differ in the key alone
PLACES = ("memory", "disk")


@dataclass(slots=True)
class Found:
    """What was measured, by name of level; what was not measured is empty."""

    levels: tuple[Level, ...]  # besides exact
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    right: dict[tuple[str, str], list[bool]] = field(default_factory=dict)  # by task and level
    seconds: dict[tuple[str, str], list[float]] = field(default_factory=dict)  # by place and level
    models: dict[str, str] = field(default_factory=dict)  # part -> model and codec


def results(found: Found, modules: ModulesConfig) -> Iterator[Result]:
    for name, verdict in found.verdicts.items():
        model: dict[str, Parameter] = {"level": name, "model": found.models["quality"]}
        for part, damage in (("text", verdict.measured.text), ("own", verdict.measured.own)):
            if damage is None:
                continue
            at = {**model, "part": part, "tokens": damage.rows}
            for metric, value, error, unit in (
                ("KL", damage.kl, damage.kl_error, "nats/token"),
                ("same likeliest token", 1 - damage.flips, damage.flips_error, "share"),
            ):
                yield Result(
                    metric=metric, value=value, unit=unit, parameters={**at, "error": error}
                )
        yield Result(
            metric="passes the gate",
            value=int(verdict.passed),
            unit="",
            parameters={**model, "why": verdict.reason},
        )
    for (task, name), right in found.right.items():
        low, high = wilson(sum(right), len(right))
        yield Result(
            metric=task,
            value=sum(right) / len(right),
            unit="share",
            parameters={
                "level": name,
                "model": found.models["retrieval"],
                "n": len(right),
                "low": round(low, 4),
                "high": round(high, 4),
            },
        )
    for (place, name), seconds in found.seconds.items():
        yield Result(
            metric=f"first token, from {place}",
            value=median(seconds),
            unit="s",
            parameters={
                "level": name,
                "model": found.models["speed"],
                "modules": modules.modules,
                "module_tokens": modules.module_tokens,
                "rounds": len(seconds),
            },
            baseline="computing it",
            baseline_value=median(found.seconds["memory", EXACT.name]),
        )


def tables(found: Found, modules: ModulesConfig) -> Iterator[Table]:
    names = [EXACT.name, *(level.name for level in found.levels)]
    if found.verdicts:
        table = _table(found, "quality", ("KL on text", "in answers", "same token", "gate"))
        for name, verdict in found.verdicts.items():
            parts = (verdict.measured.text, verdict.measured.own)
            kl = [f"{each.kl:.1e} ± {each.kl_error:.0e}" if each else "" for each in parts]
            same = f"{1 - parts[1].flips:.1%}" if parts[1] else ""
            table.add_row(name, *kl, same, "passes" if verdict.passed else "fails")
        yield table
    if found.right:
        table = _table(found, "retrieval", TASKS)
        for name in names:
            asked = (found.right[task, name] for task in TASKS)
            table.add_row(name, *(f"{sum(right)} of {len(right)}" for right in asked))
        yield table
    if found.seconds:
        table = _table(found, "speed", ("first token", "faster", "from disk", "faster"))
        exact = median(found.seconds["memory", EXACT.name])
        for name in names:
            cells = []
            for place in PLACES:
                seconds = found.seconds.get((place, name))
                cells += (
                    [f"{1000 * median(seconds):,.0f} ms", f"{exact / median(seconds):.1f}x"]
                    if seconds
                    else ["", ""]
                )
            table.add_row(name, *cells)
        yield table


def _table(found: Found, part: str, columns: Iterable[str]) -> Table:
    table = Table(title=f"Levels of exactness: {part}", caption=found.models[part])
    for name in ("level", *columns):
        table.add_column(name, justify="right")
    return table


def draw(found: Found, modules: ModulesConfig, path: Path) -> None:
    """Draws the times; where they were not measured, the facts found, or else the divergences."""
    levels = [EXACT.name, *(level.name for level in found.levels)]
    if found.seconds:
        draw_bars(
            path,
            title="Time to the first token of a prompt made of modules",
            subtitle=f"{found.models['speed']}; {modules.modules} modules of "
            f"{modules.module_tokens:,} tokens in random order; logarithmic",
            groups=levels,
            series=[
                Series(
                    label=f"from {place}",
                    values=[_median(found.seconds.get((place, name))) for name in levels],
                )
                for place in PLACES
            ],
            unit="s",
            logarithmic=True,
        )
    elif found.right:
        right = [[found.right[task, name] for name in levels] for task in TASKS]
        draw_heat_map(
            path,
            title="Facts found in modules that were encoded apart",
            subtitle=f"{found.models['retrieval']}; {modules.modules} modules in random order",
            columns=levels,
            rows=list(TASKS),
            shares=[[sum(each) / len(each) for each in row] for row in right],
            notes=[[f"{sum(each)} of {len(each)}" for each in row] for row in right],
            column_label="level of exactness",
            row_label="question",
        )
    else:
        measured = [verdict.measured for verdict in found.verdicts.values()]
        parts = {"text": [each.text for each in measured], "own": [each.own for each in measured]}
        draw_bars(
            path,
            title="KL divergence from computing all in context",
            subtitle=found.models["quality"],
            groups=list(found.verdicts),
            series=[
                Series(
                    label=PARTS[part],
                    values=[damage.kl or None if damage else None for damage in damages],
                )
                for part, damages in parts.items()
            ],
            unit="nats",
            logarithmic=True,
        )


def _median(seconds: list[float] | None) -> float | None:
    return median(seconds) if seconds else None
