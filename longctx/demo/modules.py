"""The demo's library of prompt parts: six texts computed once, asked in combinations.

Each combination is asked twice: `modular`, with every part as it was computed alone, and `exact`,
computed as a plain prompt that the server has not seen. What each took, and what it answered,
is shown side by side.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from longctx.bench.haystack import document
from longctx.needles.generator import insert

MODULE_TOKENS = 2000
SCHEMA = "library"


@dataclass(frozen=True, slots=True)
class Part:
    """A text of the library, with the one fact in it that is asked for."""

    name: str
    statement: str
    question: str
    answer: str


# Change them as you like: the texts are written when the demo runs.
PARTS = tuple(
    Part(
        name,
        f"The {what} of the {name} in {city} is {value}.",
        f"What is the {what} of the {name} in {city}?",
        value,
    )
    for name, what, city, value in (
        ("port", "gate number", "Lisbon", "4417"),
        ("archive", "access code", "Vienna", "8305"),
        ("museum", "door code", "Prague", "2964"),
        ("station", "platform number", "Madrid", "7180"),
        ("library", "shelf number", "Dublin", "3526"),
        ("opera", "seat number", "Athens", "6092"),
    )
)
# Which of them, and whose fact is asked for. No two begin alike: no prefix makes `exact` faster
COMBINATIONS = ((0, 1, 2), (1, 3, 5), (2, 3, 4, 5), (4, 5))
ASKED = (1, 3, 2, 5)


class Answer(Protocol):
    """What `show_library` reads of an answer; `tour.Said` is one."""

    @property
    def text(self) -> str: ...
    @property
    def first_token_seconds(self) -> float: ...
    @property
    def prompt_cache(self) -> dict[str, Any]: ...


Ask: TypeAlias = Callable[[str, dict[str, Any]], Answer]  # a question, and `prompt_cache`


def show_library(
    console: Console,
    *,
    store: Callable[[dict[str, Any]], dict[str, Any]],
    ask: Ask,
    count: Callable[[str], int],
) -> None:
    """Stores the texts as a schema, and asks combinations of them.

    `store` takes a schema in its JSON form and returns what the server says once its modules are
    computed; `count` returns the tokens of a text.
    """
    modules = []
    for number, part in enumerate(PARTS):
        filler = document(MODULE_TOKENS, seed=10 + number, count_tokens=count)
        text = insert(filler, [part.statement], [0.5]).strip()
        modules.append({"module": part.name, "content": f"{text}\n"})
    began = time.perf_counter()
    stored = store({"name": SCHEMA, "content": modules})
    console.print(
        f"  {len(modules)} texts, {stored['tokens']:,} tokens, computed in "
        f"{time.perf_counter() - began:.1f} s"
    )
    _show_combinations(console, ask)


def _show_combinations(console: Console, ask: Ask) -> None:
    """Asks each combination at both levels, and shows what each took and answered."""
    # The first request at a level has it measured on the model: not what is shown here
    first = ask(PARTS[0].question, _chosen((PARTS[0],), "modular"))
    reason = first.prompt_cache["level_reason"].partition("; ")[2]
    console.print(f"  [dim]measured on the model: {reason}[/]\n")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("texts", "modular", "exact", "sooner", "answers"):
        table.add_column(heading, justify="left" if heading[-1] == "s" else "right", no_wrap=True)
    for numbers, asked in zip(COMBINATIONS, ASKED, strict=True):
        parts = [PARTS[number] for number in numbers]
        fact = PARTS[asked]
        modular, exact = (
            ask(fact.question, _chosen(parts, level)) for level in ("modular", "exact")
        )
        table.add_row(
            ", ".join(part.name for part in parts),
            f"{1000 * modular.first_token_seconds:,.0f} ms",
            f"{1000 * exact.first_token_seconds:,.0f} ms",
            f"{exact.first_token_seconds / modular.first_token_seconds:,.0f} x",
            f"{_judged(modular.text, fact.answer)}, {_judged(exact.text, fact.answer)}",
        )
    console.print(Padding(table, (0, 0, 0, 2)))


def _chosen(parts: Sequence[Part], level: str) -> dict[str, Any]:
    return {"schema": SCHEMA, "modules": [part.name for part in parts], "level": level}


def _judged(given: str, expected: str) -> str:
    if given.strip() == expected:
        return f"[green]{expected}[/]"
    return f"[red]{given.strip()[:16] or 'nothing'}[/] (not {expected})"
