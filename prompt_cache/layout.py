"""Which positions each module of a schema takes: they are given out when the schema is read.

In reading order, each text takes as many positions as it has tokens and each parameter as many as
its `length`. Members of a union begin at the same position, and the union ends where the longest
of them does. Text that is always present, and what the chat template puts before each message (a
frame), is joined to anonymous modules, "#1", "#2", ...

                                              tokens    positions
    (frame)                                   3           0 ..   2     "#1"
    Be brief.                                 4           3 ..   6     "#1"
    <module name="trip">
      Plan a trip of                          5           7 ..  11     "trip", piece 0
      <parameter name="days" length="8"/>     at most 8  12 ..  19     "trip", a gap of 8
      .                                       1          20            "trip", piece 1
      <union>
        <module name="harbour">...            100        21 .. 120     "harbour"
        <module name="mountains">...          60         21 ..  80     "mountains"
      </union>
      Come back.                              3         121 .. 123     "trip", piece 2
    </module>                                                          the schema ends at 124

A module's *own* pieces are its text without the modules inside it. They are computed together, each
at its positions: "trip" is computed once, as 9 tokens with gaps.

Source: Prompt Cache, https://arxiv.org/abs/2311.04934, section 3.3.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from prompt_cache.errors import SchemaError
from prompt_cache.schema import (
    ModuleNode,
    Node,
    ParameterNode,
    ScaffoldNode,
    Schema,
    TextNode,
    UnionNode,
)

Encode: TypeAlias = Callable[[str], Sequence[int]]


@dataclass(frozen=True, slots=True)
class PlacedTokens:
    """Tokens at consecutive positions."""

    token_ids: tuple[int, ...]
    position: int

    @property
    def end(self) -> int:
        return self.position + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class PlacedParameter:
    """The positions that are reserved for an argument, and the tokens of its default."""

    name: str
    position: int
    length: int
    default: tuple[int, ...] | None

    @property
    def end(self) -> int:
        return self.position + self.length


@dataclass(frozen=True, slots=True)
class PlacedModule:
    """A module at its positions; an anonymous one is in every prompt."""

    name: str
    position: int
    end: int  # where the last of its parts ends
    parts: tuple["PlacedPart", ...]  # in reading order
    anonymous: bool = False

    @property
    def pieces(self) -> tuple[PlacedTokens, ...]:
        """Its own texts, without those of the modules inside it."""
        return tuple(part for part in self.parts if isinstance(part, PlacedTokens))

    @property
    def parameters(self) -> tuple[PlacedParameter, ...]:
        """Its own parameters, without those of the modules inside it."""
        return tuple(part for part in self.parts if isinstance(part, PlacedParameter))

    @property
    def tokens(self) -> int:
        """The number of tokens of its own pieces."""
        return sum(len(piece.token_ids) for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class PlacedUnion:
    """Modules that all begin at `position`; a prompt has at most one of them."""

    position: int
    end: int
    members: tuple[PlacedModule, ...]


@dataclass(frozen=True, slots=True)
class PlacedScaffold:
    """Modules one after another, which are also computed together as one module."""

    position: int
    end: int
    members: tuple[PlacedModule, ...]

    @property
    def name(self) -> str:
        """The name of the module that its members form when they are computed together."""
        return "+".join(member.name for member in self.members)

    @property
    def pieces(self) -> tuple[PlacedTokens, ...]:
        """The pieces of all members."""
        return tuple(piece for member in self.members for piece in member.pieces)

    @property
    def tokens(self) -> int:
        """The number of tokens of all members."""
        return sum(member.tokens for member in self.members)


PlacedPart: TypeAlias = PlacedTokens | PlacedParameter | PlacedModule | PlacedUnion | PlacedScaffold


@dataclass(frozen=True, slots=True)
class SchemaLayout:
    """A schema in a model's tokens, at positions from 0 to before `end`.

    `parts` are modules (also anonymous ones), unions and scaffolds, in reading order. With
    `ends_in_role` the schema's last text is a whole message; otherwise the request's own text goes
    on in the same message.
    """

    name: str
    parts: tuple[PlacedPart, ...]
    end: int
    ends_in_role: bool

    def modules(self) -> Iterator[PlacedModule]:
        """Yield all modules, anonymous and inner ones too, in reading order."""
        return _modules(self.parts)

    def scaffolds(self) -> Iterator[PlacedScaffold]:
        """Yield all scaffolds, in reading order."""
        return (part for part in _walk(self.parts) if isinstance(part, PlacedScaffold))

    def encoded(self) -> Iterator[tuple[str, tuple[PlacedTokens, ...]]]:
        """Yield what is computed once: the name and the pieces of each module and scaffold."""
        for part in _walk(self.parts):
            if isinstance(part, PlacedModule | PlacedScaffold) and part.pieces:
                yield part.name, part.pieces


def lay_out(
    schema: Schema,
    encode: Encode,
    frames: Sequence[Sequence[int]],
    *,
    max_positions: int,
) -> SchemaLayout:
    """Give every text and parameter of a schema its positions.

    `encode` returns the tokens of text that follows other text. `frames` are the tokens that the
    chat template puts before each message, and before the message that the schema's last content
    begins, if there is any. Raises SchemaError for a default that is longer than its parameter, and
    when the schema takes `max_positions` or more.
    """
    messages = [role.content for role in schema.roles]
    if schema.content:
        messages.append(schema.content)
    assert len(frames) == len(messages), "a frame for each message"
    builder = _LayoutBuilder(encode)
    for frame, content in zip(frames, messages, strict=True):
        builder.anonymous_tokens(frame)
        for node in content:
            builder.anonymous_node(node)
    builder.end_anonymous()
    if builder.position >= max_positions:
        raise _too_long(schema, builder, max_positions)
    return SchemaLayout(
        schema.name, tuple(builder.parts), builder.position, ends_in_role=not schema.content
    )


def _too_long(schema: Schema, builder: "_LayoutBuilder", max_positions: int) -> SchemaError:
    message = (
        f'schema "{schema.name}" takes {builder.position:,} positions, the limit is '
        f"{max_positions:,} together with question and answer; shorten it, put what is never used "
        "together into a union, or split it"
    )
    named = [module for module in _modules(builder.parts) if not module.anonymous]
    if named:
        longest = max(named, key=lambda module: module.end - module.position)
        positions = longest.end - longest.position
        message += f'; its longest module is "{longest.name}" with {positions:,}'
    return SchemaError(message)


@dataclass(slots=True)
class _LayoutBuilder:
    """Gives out positions in reading order; `position` is the next one."""

    encode: Encode
    position: int = 0
    parts: list[PlacedPart] = field(default_factory=list)
    # What the next anonymous module will hold, and how many there were before it
    _run: list[PlacedTokens | PlacedParameter] = field(default_factory=list)
    _runs: int = 0

    def anonymous_tokens(self, token_ids: Sequence[int]) -> None:
        """Add tokens to the anonymous module; they join those just before them to one piece."""
        if not token_ids:
            return
        if self._run and isinstance(last := self._run[-1], PlacedTokens):
            self._run[-1] = PlacedTokens((*last.token_ids, *token_ids), last.position)
        else:
            self._run.append(PlacedTokens(tuple(token_ids), self.position))
        self.position += len(token_ids)

    def anonymous_node(self, node: Node) -> None:
        """Add a node of a message: text and parameters join the anonymous module."""
        match node:
            case TextNode(text):
                self.anonymous_tokens(self.encode(text))
            case ParameterNode():
                self._run.append(self._parameter(node))
            case _:
                self.end_anonymous()
                self.parts.append(self._part(node))

    def end_anonymous(self) -> None:
        """Close the anonymous module, if it has anything."""
        if self._run:
            self._runs += 1
            run = tuple(self._run)
            self._run.clear()
            self.parts.append(
                PlacedModule(f"#{self._runs}", run[0].position, self.position, run, anonymous=True)
            )

    def _part(self, node: Node) -> PlacedPart:
        begin = self.position
        match node:
            case TextNode(text):
                piece = PlacedTokens(tuple(self.encode(text)), begin)
                self.position = piece.end
                return piece
            case ParameterNode():
                return self._parameter(node)
            case ModuleNode():
                return self._module(node)
            case UnionNode(members):
                placed, end = [], begin
                for member in members:
                    self.position = begin
                    placed.append(self._module(member))
                    end = max(end, self.position)
                self.position = end
                return PlacedUnion(begin, end, tuple(placed))
            case ScaffoldNode(members):
                placed = [self._module(member) for member in members]
                return PlacedScaffold(begin, self.position, tuple(placed))

    def _module(self, module: ModuleNode) -> PlacedModule:
        begin = self.position
        parts = tuple(self._part(node) for node in module.content)
        # A text may have no tokens at all, since some tokenizers drop white space
        kept = tuple(p for p in parts if not isinstance(p, PlacedTokens) or p.token_ids)
        return PlacedModule(module.name, begin, self.position, kept)

    def _parameter(self, parameter: ParameterNode) -> PlacedParameter:
        default = None
        if parameter.default is not None:
            default = tuple(self.encode(parameter.default))
            if len(default) > parameter.length:
                raise SchemaError(
                    f'{parameter.where}, parameter "{parameter.name}": its default has '
                    f"{len(default)} tokens, its length is {parameter.length}; set length to "
                    f"{len(default)} or more, or shorten the default"
                )
        placed = PlacedParameter(parameter.name, self.position, parameter.length, default)
        self.position = placed.end
        return placed


def _walk(parts: Iterable[PlacedPart]) -> Iterator[PlacedPart]:
    """Yield all parts, those inside others too, in reading order."""
    for part in parts:
        yield part
        match part:
            case PlacedModule():
                yield from _walk(part.parts)
            case PlacedUnion() | PlacedScaffold():
                yield from _walk(part.members)


def _modules(parts: Iterable[PlacedPart]) -> Iterator[PlacedModule]:
    return (part for part in _walk(parts) if isinstance(part, PlacedModule))
