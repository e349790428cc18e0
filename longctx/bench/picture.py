"""Pictures of results: a heat map of a needle grid, and bars of times. Only it needs matplotlib."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

INK, QUIET, PAPER = "#1f2933", "#6b7785", "#ffffff"
# Rust to teal by way of paper: told apart by every kind of eye, and in print.
MISSED_TO_FOUND = LinearSegmentedColormap.from_list(
    "missed to found", ["#a63603", "#e8905a", "#f7ead7", "#8cc5bd", "#12707a"]
)
SERIES = ("#12707a", "#c9702f", "#8a97a6", "#7a4a8c")
DPI = 160


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Bars of one color, one per group; None leaves a gap."""

    label: str
    values: Sequence[float | None]


def draw_heat_map(
    path: Path,
    *,
    title: str,
    subtitle: str,
    columns: Sequence[str],
    rows: Sequence[str],
    shares: Sequence[Sequence[float]],
    notes: Sequence[Sequence[str]],
    column_label: str,
    row_label: str,
) -> None:
    """Draws cells colored by `shares` [rows][columns] in [0, 1], with small `notes` below each."""
    left = max(1.15, 0.45 + 0.09 * max(map(len, rows)))
    width = max(6.4, left + 0.75 + 1.15 * len(columns))
    height = 2.1 + 0.62 * len(rows)
    figure = _figure(width, height)
    axes = figure.add_axes(
        (left / width, 0.75 / height, 1 - (left + 0.35) / width, 1 - 1.85 / height)
    )
    for row, line in enumerate(shares):
        for column, share in enumerate(line):
            axes.add_patch(
                FancyBboxPatch(
                    (column + 0.04, row + 0.05),
                    0.92,
                    0.9,
                    boxstyle="round,pad=0,rounding_size=0.06",
                    facecolor=MISSED_TO_FOUND(share),
                    edgecolor="none",
                )
            )
            ink = PAPER if share > 0.8 or share < 0.15 else INK
            center = column + 0.5
            axes.text(
                center, row + 0.42, f"{100 * share:.0f}%", color=ink, size=11, weight="bold",
                ha="center", va="center",
            )  # fmt: skip
            axes.text(
                center, row + 0.74, notes[row][column], color=ink, size=6.5, alpha=0.85,
                ha="center", va="center",
            )  # fmt: skip
    axes.set_xlim(0, len(columns))
    axes.set_ylim(len(rows), 0)  # the start of the document on top, as one reads
    axes.set_xticks([column + 0.5 for column in range(len(columns))], columns)
    axes.set_yticks([row + 0.5 for row in range(len(rows))], rows)
    _label(axes, column_label, row_label)
    _headline(figure, title, subtitle)
    _save(figure, path)


def draw_bars(
    path: Path,
    *,
    title: str,
    subtitle: str,
    groups: Sequence[str],
    series: Sequence[Series],
    unit: str,
    logarithmic: bool = False,
) -> None:
    """Draws groups of horizontal bars, one per series, each with its value; shorter is better.

    On a logarithmic scale a value that is not above 0 has no bar.
    """
    rows = len(groups) * (len(series) + 0.7)
    width, height = 7.6, 1.75 + 0.34 * rows
    figure = _figure(width, height)
    axes = figure.add_axes((1.75 / width, 0.4 / height, 1 - 2.7 / width, 1 - 1.6 / height))
    values = [value for each in series for value in each.values if value is not None]
    floor = min((value for value in values if value > 0), default=1.0) / 3 if logarithmic else 0.0
    for number, each in enumerate(series):
        drawn = [group for group, value in enumerate(each.values) if value is not None]
        for group, value in enumerate(each.values):
            if value is None:
                continue
            place = group * (len(series) + 0.7) + number
            end = max(value, floor)
            axes.barh(
                place, end - floor, left=floor, height=0.82, color=SERIES[number % len(SERIES)],
                label=each.label if group == drawn[0] else "",
            )  # fmt: skip
            axes.annotate(
                f"{value:,.3g} {unit}", (end, place), xytext=(4, 0), textcoords="offset points",
                va="center", size=8, color=INK,
            )  # fmt: skip
    if logarithmic:
        axes.set_xscale("log")
    axes.set_xlim(floor, max(floor, *values) * (1.6 if logarithmic else 1.02))
    middle = (len(series) - 1) / 2
    axes.set_yticks([group * (len(series) + 0.7) + middle for group in range(len(groups))], groups)
    axes.invert_yaxis()
    axes.xaxis.set_visible(False)  # each bar carries its value
    _label(axes, "", "")
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1.0), ncols=len(series), frameon=False, fontsize=8.5,
        borderaxespad=0, handlelength=1.0, labelcolor=INK,
    )  # fmt: skip
    _headline(figure, title, subtitle)
    _save(figure, path)


def draw_first_tokens(
    path: Path, *, subtitle: str, lengths: Sequence[int], series: Sequence[Series]
) -> None:
    """Draws seconds to the first token, on a logarithmic scale, by length of the document."""
    draw_bars(
        path,
        title="Time to the first token of an answer",
        subtitle=f"{subtitle}; logarithmic",
        groups=[f"{tokens:,} tokens" for tokens in lengths],
        series=series,
        unit="s",
        logarithmic=True,
    )


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), facecolor=PAPER)
    FigureCanvasAgg(figure)
    return figure


def _headline(figure: Figure, title: str, subtitle: str) -> None:
    width, height = figure.get_size_inches()
    left = 0.3 / width
    figure.text(left, 1 - 0.3 / height, title, size=14, weight="bold", color=INK, va="top")
    figure.text(left, 1 - 0.64 / height, subtitle, size=8.5, color=QUIET, va="top")


def _label(axes: Axes, column_label: str, row_label: str) -> None:
    axes.set_xlabel(column_label, color=QUIET, size=9, labelpad=8)
    axes.set_ylabel(row_label, color=QUIET, size=9, labelpad=8)
    axes.tick_params(length=0, colors=INK, labelsize=9.5)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=DPI, metadata={"Software": "longctx"})
