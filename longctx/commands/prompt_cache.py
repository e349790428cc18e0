"""`longctx prompt-cache check FILE`: whether a schema can be used, and its positions.

Reads the model's tokenizer and chat template, not its weights, so it answers in seconds. Positions
are those that the server gives the same schema.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from longctx.commands.arguments import read_engine_config
from longctx.config import ModelConfig
from longctx.errors import LongctxError
from longctx.model.loader import context_tokens
from longctx.model.named import model_name
from longctx.text.chat_template import ChatPrompts
from longctx.text.tokenizer import Tokenizer
from prompt_cache.errors import SchemaError
from prompt_cache.layout import (
    PlacedModule,
    PlacedParameter,
    PlacedPart,
    PlacedScaffold,
    PlacedTokens,
    PlacedUnion,
    SchemaLayout,
    lay_out,
)
from prompt_cache.read import read_schema
from prompt_cache.schema import MAX_BYTES, Schema

INDENT = "  "
EXCERPT_CHARACTERS = 32

Action = Callable[[argparse.Namespace, ModelConfig, Path], None]
Row = tuple[str, str, str, str]


def run(arguments: argparse.Namespace) -> None:
    """Do one action on a schema. Raises LongctxError, for a schema with a fault too."""
    engine, folder = read_engine_config(arguments)
    ACTIONS[arguments.action](arguments, engine.model, folder)


def _check(arguments: argparse.Namespace, config: ModelConfig, folder: Path) -> None:
    file: Path = arguments.file
    try:
        schema = read_schema(_read(file))
    except SchemaError as error:
        raise LongctxError(f"{file}: {error}") from error
    tokenizer = Tokenizer(folder)
    limit = context_tokens(config, folder)
    try:
        layout = lay_out_for(schema, tokenizer, ChatPrompts(tokenizer), max_positions=limit)
    except SchemaError as error:
        raise LongctxError(f"{file}: {error}") from error
    console = Console(highlight=False, soft_wrap=True)
    console.print(layout_table(layout, tokenizer.decode))
    console.print(summary(layout, limit, model_name(folder)), markup=False)


ACTIONS: dict[str, Action] = {"check": _check}


def lay_out_for(
    schema: Schema,
    tokenizer: Tokenizer,
    prompts: ChatPrompts,
    *,
    max_positions: int,
    date: str | None = None,
) -> SchemaLayout:
    """Lay a schema out in a model's tokens. Raises SchemaError, InvalidRequest."""
    return lay_out(
        schema,
        lambda text: tokenizer.encode(text, continues=True),
        prompts.frames(
            [role.role for role in schema.roles], continued=bool(schema.content), date=date
        ),
        max_positions=max_positions,
    )


def layout_table(layout: SchemaLayout, decode: Callable[[tuple[int, ...]], str]) -> Table:
    """Make a table: a row for each module, parameter, union and scaffold, indented as nested."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    headings = ("positions", "tokens", layout.name)
    rows = list(_rows(layout.parts, 0, decode))
    for heading, cells in zip(headings, zip(*rows, strict=True), strict=False):
        widest = max(map(len, (heading, *cells)))  # on a narrow screen the last column gives way
        right = heading is not layout.name
        table.add_column(heading, justify="right" if right else "left", min_width=widest)
    table.add_column("", style="dim", no_wrap=True, overflow="ellipsis")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def summary(layout: SchemaLayout, limit: int, model: str) -> str:
    encoded = list(layout.encoded())
    tokens = sum(len(piece.token_ids) for _, pieces in encoded for piece in pieces)
    least, most = _extent(layout.parts, choose=min), _extent(layout.parts, choose=max)
    lines = [
        f"{layout.end:,} of {limit:,} positions of {model}; "
        f"{limit - layout.end:,} are left for question and answer",
        f"{tokens:,} tokens are computed once, in {len(encoded)} modules; "
        f"a prompt has {least:,} to {most:,} of them",
    ]
    if layout.ends_in_role:
        lines.append("the schema ends with a whole message; the request's messages follow")
    else:
        lines.append("the request's first message goes on where the schema ends")
    return "\n".join(["", *lines])


def _rows(
    parts: Iterable[PlacedPart], depth: int, decode: Callable[[tuple[int, ...]], str]
) -> Iterator[Row]:
    for part in parts:
        span = f"{part.position:,} - {part.end - 1:,}" if part.end > part.position else "-"
        lead = INDENT * depth
        match part:
            case PlacedTokens():
                continue
            case PlacedParameter(name, _, length, default):
                told = "no default" if default is None else f"default {decode(default)!r}"
                yield (span, f"{length:,}", f"{lead}<{name}>", f"parameter, {told}")
            case PlacedModule():
                text = _excerpt(decode(part.pieces[0].token_ids)) if part.pieces else ""
                what = "always there: " if part.anonymous else ""
                yield (span, f"{part.tokens:,}", f"{lead}{part.name}", f"{what}{text}")
                yield from _rows(part.parts, depth + 1, decode)
            case PlacedUnion(_, _, members):
                yield (span, "", f"{lead}union", f"at most one of {len(members)}")
                yield from _rows(members, depth + 1, decode)
            case PlacedScaffold(_, _, members):
                tokens = sum(len(piece.token_ids) for piece in part.pieces)
                told = "also computed together, for prompts with all of it"
                yield (span, f"{tokens:,}", f"{lead}scaffold", told)
                yield from _rows(members, depth + 1, decode)


def _extent(parts: Iterable[PlacedPart], *, choose: Callable[..., int]) -> int:
    """Count the fewest or most tokens that a prompt has of these parts, without arguments."""
    total = 0
    for part in parts:
        match part:
            case PlacedTokens(token_ids):
                total += len(token_ids)
            case PlacedParameter():
                continue
            case PlacedModule(anonymous=True):
                total += part.tokens
            case PlacedModule():
                total += choose(0, _extent(part.parts, choose=choose))
            case PlacedUnion(_, _, members):
                total += choose(0, *(_extent([member], choose=choose) for member in members))
            case PlacedScaffold(_, _, members):
                total += _extent(members, choose=choose)
    return total


def _excerpt(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= EXCERPT_CHARACTERS else f"{text[: EXCERPT_CHARACTERS - 3]}..."


def _read(file: Path) -> str:
    try:
        if file.stat().st_size > MAX_BYTES:
            raise LongctxError(f"{file} is larger than {MAX_BYTES:,} bytes, the limit of a schema")
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise LongctxError(f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise LongctxError(f"{file} is not UTF-8: {error.reason} at byte {error.start}") from error
