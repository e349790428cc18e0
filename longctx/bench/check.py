"""Whether quality is what it was: a baseline's benchmarks once more, each figure in its interval.

A baseline is a file of JSON: `runs`, each with the name of a benchmark, its options, and the
figures that it came to with their 95% intervals. A figure fails that is worse than its interval;
one that is better is told. `--renew` writes what is measured now into the file, which is also how a
new one is made: write the runs without `figures`. Read `judge`.
"""

import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from longctx.bench import BENCHES
from longctx.bench.config import BenchConfig, CheckConfig
from longctx.bench.options import read_configs
from longctx.bench.picture import draw_heat_map
from longctx.bench.report import Parameter, Report, Result, commit, machine
from longctx.errors import InvalidRequest
from longctx.needles.scores import wilson

# What of a row does not say which figure it is: its statistics, and what depends on the machine
UNNAMED = frozenset(("n", "low", "high", "error", "tokens", "discriminates", "device", "backend"))
FINE = "depth_percent"  # cells of a grid have few questions; their lengths are judged
HIGHER_IS_BETTER = {"exact match", "recall"}
LOWER_IS_BETTER = {"KL", "flips", "nats more"}
DIGITS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure of a run, with what it was measured of and its interval."""

    metric: str
    at: Mapping[str, Parameter]
    value: float
    low: float
    high: float

    @property
    def name(self) -> tuple[str, frozenset[tuple[str, Parameter]]]:
        return self.metric, frozenset(self.at.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A figure of the baseline beside what it is now; None where nothing measured it."""

    bench: str
    before: Figure
    now: float | None

    @property
    def worse_by(self) -> float:
        """How far it is beyond its interval, on the bad side; 0 within it."""
        if self.now is None:
            return 0.0
        if self.before.metric in HIGHER_IS_BETTER:
            return max(0.0, self.before.low - self.now)
        return max(0.0, self.now - self.before.high)

    @property
    def holds(self) -> bool:
        return self.now is not None and not self.worse_by

    @property
    def better(self) -> bool:
        if self.now is None:
            return False
        if self.before.metric in HIGHER_IS_BETTER:
            return self.now > self.before.high
        return self.now < self.before.low

    def __str__(self) -> str:
        was = f"{_number(self.before.low)} to {_number(self.before.high)}"
        if self.now is None:
            return f"{self.label} is not measured any more; it was {was}"
        return (
            f"{self.label} is {_number(self.now)}, worse by {_number(self.worse_by)} than its "
            f"interval of {was}"
        )

    @property
    def label(self) -> str:
        at = ", ".join(str(value) for value in self.before.at.values())
        return f"{self.bench}: {self.before.metric} ({at})"


def run(bench: BenchConfig, check: CheckConfig, *, say: Callable[[str], None]) -> Report:
    """Runs the benchmarks of a baseline. Raises InvalidRequest where the file is none."""
    if check.baseline is None:
        raise InvalidRequest("name what to compare with, such as --baseline docs/baseline.json")
    baseline = _read(check.baseline)
    if not check.renew and not any(each.get("figures") for each in baseline["runs"]):
        raise InvalidRequest(f"{check.baseline} has no figures yet; --renew measures them")
    judged: list[Judged] = []
    for each in baseline["runs"]:
        say(f"{each['bench']} {' '.join(each['options'])}")
        now = tuple(figures(_measured(each["bench"], each["options"], say).results))
        judged += judge(each["bench"], _figures_of(each), now)
        each["figures"] = [_as_written(figure) for figure in now]
    if check.renew:
        written = {"machine": machine(), "commit": commit(), "runs": baseline["runs"]}
        check.baseline.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
        say(f"written: {check.baseline}")
    return Report(
        results=tuple(_results(judged)),
        tables=(_table(judged, check.baseline),),
        draw=partial(_draw, judged),
        failures=() if check.renew else tuple(str(each) for each in judged if not each.holds),
    )


def figures(results: Sequence[Result]) -> Iterator[Figure]:
    """Yields the figures of quality among results, those with an interval."""
    for result in results:
        told = result.parameters
        if FINE in told or result.metric not in HIGHER_IS_BETTER | LOWER_IS_BETTER:
            continue
        if "error" in told:
            error = _float(told["error"])
            low, high = result.value - error, result.value + error
            if result.metric == "flips" and not error:  # none is not never
                tokens = round(_float(told["tokens"]))
                low, high = wilson(result.value * tokens, tokens)
        else:
            low, high = _float(told["low"]), _float(told["high"])
        at = {name: value for name, value in told.items() if name not in UNNAMED}
        yield Figure(metric=result.metric, at=at, value=result.value, low=low, high=high)


def judge(bench: str, before: Sequence[Figure], now: Sequence[Figure]) -> Iterator[Judged]:
    """Yields every figure of the baseline beside the same figure now."""
    found = {figure.name: figure.value for figure in now}
    for figure in before:
        yield Judged(bench=bench, before=figure, now=found.get(figure.name))


def _measured(name: str, options: Sequence[str], say: Callable[[str], None]) -> Report:
    bench = BENCHES[name]
    configs = read_configs(name, bench.configs, options)
    report: Report = importlib.import_module(bench.module).run(*configs, say=say)
    return report


def _read(file: Path) -> dict[str, Any]:
    try:
        baseline = json.loads(file.read_text(encoding="utf-8"))
        for each in baseline["runs"]:
            if each["bench"] not in BENCHES or each["bench"] == "check":
                raise ValueError(f"no benchmark {each['bench']!r}")
            if not all(isinstance(word, str) for word in each["options"]):
                raise ValueError("options are words")
            _figures_of(each)
    except OSError as error:
        raise InvalidRequest(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidRequest(
            f"{file} is no baseline ({error!r}); it is {{'runs': [{{'bench': 'niah', 'options': "
            "['--lengths', '4096']}]}, and --renew adds the figures"
        ) from error
    return {"runs": baseline["runs"]}


def _figures_of(written: Mapping[str, Any]) -> list[Figure]:
    return [Figure(**each) for each in written.get("figures", ())]


def _as_written(figure: Figure) -> dict[str, Any]:
    rounded = {
        name: float(f"{getattr(figure, name):.{DIGITS}g}") for name in ("value", "low", "high")
    }
    return {**asdict(figure), **rounded}


def _results(judged: Sequence[Judged]) -> Iterator[Result]:
    for each in judged:
        if each.now is not None:
            told = {"bench": each.bench, **each.before.at, "before": each.before.value}
            interval = {"low": each.before.low, "high": each.before.high, "holds": each.holds}
            yield Result(
                metric=each.before.metric, value=each.now, unit="", parameters={**told, **interval}
            )
    failing = sum(not each.holds for each in judged)
    yield Result(metric="figures that fail", value=failing, unit="figures")


def _table(judged: Sequence[Judged], file: Path) -> Table:
    title = "Is quality what it was?"
    table = Table(title=title, caption=f"{file.name}: 95% intervals", caption_justify="left")
    table.add_column("figure")
    for name in ("before", "interval", "now"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for each in judged:
        table.add_row(
            each.label,
            _number(each.before.value),
            f"{_number(each.before.low)} to {_number(each.before.high)}",
            "" if each.now is None else _number(each.now),
            "better" if each.better else "holds" if each.holds else "fails",
        )
    return table


def _draw(judged: Sequence[Judged], path: Path) -> None:
    draw_heat_map(
        path,
        title="Is quality what it was?",
        subtitle="figures of the baseline in their 95% intervals",
        columns=[""],
        rows=[each.label for each in judged],
        shares=[[1.0 if each.holds else 0.0] for each in judged],
        notes=[
            [
                f"{'not measured' if each.now is None else _number(each.now)}, "
                f"{_number(each.before.low)} to {_number(each.before.high)}"
            ]
            for each in judged
        ],
        column_label="",
        row_label="",
    )


def _number(value: float) -> str:
    return f"{value:.3g}"


def _float(value: Parameter) -> float:
    assert isinstance(value, (int, float)), "an interval is of numbers"
    return float(value)
