"""What `documents.py` measured, as results, a table and a picture of every question."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from rich.table import Table

from longctx.bench.picture import Series, draw_bars
from longctx.bench.report import Parameter, Result
from longctx.bench.versus.documents import Conversation

OWN = "longctx"
MB = 1e6
FIGURES: tuple[tuple[str, str, Callable[[Conversation], float]], ...] = (
    ("first question of all", "s", lambda talk: talk.cold_seconds),
    ("another question", "s", lambda talk: talk.warm_seconds),
    ("first question after the restart", "s", lambda talk: talk.restored_seconds),
    ("saving", "s", lambda talk: talk.save_seconds),
    ("restoring", "s", lambda talk: talk.restore_seconds),
    ("bytes on disk", "MB", lambda talk: talk.stored_bytes / MB),
)


def conversation_results(
    talks: Mapping[str, Conversation], common: Mapping[str, Parameter]
) -> Iterator[Result]:
    """Yield each figure, against the rival where there is one, and the share of same answers."""
    own = talks[OWN]
    rivals = [name for name in talks if name != OWN]
    at = {**common, "context_tokens": own.tokens, "questions": len(own.before)}
    for metric, unit, figure in FIGURES:
        value = figure(own)
        if not rivals:
            yield Result(metric=metric, value=value, unit=unit, parameters=at)
        for name in rivals:
            yield Result(
                metric=metric,
                value=value,
                unit=unit,
                parameters=at,
                baseline=name,
                baseline_value=figure(talks[name]),
            )
    for name, talk in talks.items():
        if talk.uncached:
            yield Result(
                metric="same answer as without a cache",
                value=talk.same / len(talk.uncached),
                unit="share",
                parameters={**at, "server": name, "asked_again": len(talk.uncached)},
            )


def conversation_table(talks: Mapping[str, Conversation], common: Mapping[str, Parameter]) -> Table:
    """Make a table with a column per server."""
    own = talks[OWN]
    table = Table(
        title=f"{len(own.before)} questions on a document, a restart, {len(own.after)} more",
        caption=f"{common['model']}, {own.tokens:,} tokens, {common['threads']} threads; seconds "
        "to the first piece of an answer; above 1x longctx is better",
    )
    for column in ("", *talks):
        table.add_column(column, justify="right")
    for metric, unit, figure in FIGURES:
        cells = []
        for name, talk in talks.items():
            value, ours = figure(talk), figure(own)
            ratio = f" {value / ours:.2f}x" if name != OWN and ours and value else ""
            shown = f"{value:,.3f} s" if unit == "s" else f"{value:,.1f} {unit}"
            cells.append(shown + ratio)
        table.add_row(metric, *cells)
    same = [
        f"{talk.same} of {len(talk.uncached)}" if talk.uncached else "-" for talk in talks.values()
    ]
    table.add_row("answers as without a cache", *same)
    return table


def draw_conversations(
    talks: Mapping[str, Conversation], common: Mapping[str, Parameter], path: Path
) -> None:
    """Draw a bar for each question, in their order, on a logarithmic scale."""
    own = talks[OWN]
    groups = [f"question {number + 1}" for number in range(len(own.before))]
    groups += [f"restarted, {number + 1}" for number in range(len(own.after))]
    draw_bars(
        path,
        title="Time to the first piece of an answer",
        subtitle=f"{common['model']}, one document, {own.tokens:,} tokens, "
        f"{common['threads']} threads; logarithmic",
        groups=groups,
        series=[Series(label=name, values=_seconds(talk)) for name, talk in talks.items()],
        unit="s",
        logarithmic=True,
    )


def _seconds(talk: Conversation) -> list[float]:
    """Return what each question took; that of restoring is part of the first after the restart."""
    after = [asked.first_token_seconds for asked in talk.after]
    after[0] += talk.restore_seconds
    return [asked.first_token_seconds for asked in talk.before] + after
