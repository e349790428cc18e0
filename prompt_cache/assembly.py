"""One prompt out of a schema: the chosen modules at their positions, with arguments in place.

An `AssembledPrompt` says, in reading order, what is reused of a module's computed state and what is
literal text. A module inside others brings them along; a scaffold is reused as a whole where all of
its members were chosen. The request's own text follows the last token.

With the schema of `layout.py`, modules ["mountains"] and the argument days="a week" of 2 tokens:

    "#1"         positions   0 ..   6    literal: 7 tokens are fewer than SHORT_TOKENS
    "trip"                   7 ..  11    literal; "mountains" has brought it along
    days                    12 ..  13    literal, the argument; 14 .. 19 stay empty
    "trip"                  20           literal
    "mountains"             21 ..  80    reused: its piece 0, of 60 tokens
    "trip"                 121 .. 123    literal
    question               124 ..
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from prompt_cache.errors import SchemaError
from prompt_cache.layout import (
    Encode,
    PlacedModule,
    PlacedParameter,
    PlacedPart,
    PlacedScaffold,
    PlacedTokens,
    PlacedUnion,
    SchemaLayout,
)

# A shorter piece is computed in the prompt: that costs next to nothing, and it sees what is before
SHORT_TOKENS = 16


@dataclass(frozen=True, slots=True)
class ReusedPiece:
    """Piece number `piece` of what `SchemaLayout.encoded` calls `module`, at its position."""

    module: str
    piece: int
    token_ids: tuple[int, ...]
    position: int


@dataclass(frozen=True, slots=True)
class LiteralTokens:
    """Tokens that are computed in the prompt: an argument, or a short piece."""

    token_ids: tuple[int, ...]
    position: int


PromptPart: TypeAlias = ReusedPiece | LiteralTokens


@dataclass(frozen=True, slots=True)
class AssembledPrompt:
    """The beginning of a prompt: its parts in reading order, at ascending positions with gaps."""

    parts: tuple[PromptPart, ...]

    @property
    def end(self) -> int:
        """The position of what follows the last part."""
        last = self.parts[-1]
        return last.position + len(last.token_ids)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The tokens of the same prompt as plain text, without gaps."""
        return tuple(token for part in self.parts for token in part.token_ids)


def assemble(
    layout: SchemaLayout,
    modules: Iterable[str],
    arguments: Mapping[str, str],
    encode: Encode,
) -> AssembledPrompt:
    """Make a prompt of the chosen modules. `encode` returns the tokens of an argument.

    Raises SchemaError for a module that is not there, two members of one union, and an argument
    that is missing, too long, or of no chosen module.
    """
    choice = _Choice(layout, encode, arguments)
    for name in modules:
        choice.take(name)
    parts = tuple(choice.parts())
    choice.check_arguments_used()
    if not parts:
        raise SchemaError(
            f'schema "{layout.name}" has no text outside of its modules; choose one of them',
            param="modules",
        )
    return AssembledPrompt(parts)


@dataclass(slots=True)
class _Choice:
    """The modules chosen from a schema. `take` them all, then ask for the `parts` once."""

    layout: SchemaLayout
    encode: Encode
    arguments: Mapping[str, str]
    _enclosing: dict[str, tuple[PlacedModule | PlacedUnion, ...]] = field(default_factory=dict)
    _taken: dict[str, str] = field(default_factory=dict)  # module -> the name that brought it
    # By id of the union: the member that was chosen, and the name that chose it
    _of_union: dict[int, tuple[str, str]] = field(default_factory=dict)
    _used: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._enter(self.layout.parts, ())

    def take(self, name: str) -> None:
        """Choose a module, and all modules around it. Raises SchemaError."""
        enclosing = self._enclosing.get(name)
        if enclosing is None:
            raise self._unknown(name)
        # From the module outwards, `member` is what each union has it in: itself or an outer module
        member = name
        self._taken.setdefault(name, name)
        for outer in reversed(enclosing):
            if isinstance(outer, PlacedModule):
                member = outer.name
                self._taken.setdefault(member, name)
                continue
            other, asked = self._of_union.setdefault(id(outer), (member, name))
            if other != member:
                raise SchemaError(
                    f"{self._of(name, member)} and {self._of(asked, other)} are members of one "
                    "union, which stand at the same positions; choose one of them",
                    param="modules",
                )

    def parts(self) -> Iterator[PromptPart]:
        """Yield the parts of the prompt. Raises SchemaError for an argument that does not fit."""
        return self._parts(self.layout.parts, None)

    def check_arguments_used(self) -> None:
        """Raise SchemaError for an argument that no part of the prompt has asked for."""
        for name in self.arguments:
            if name in self._used:
                continue
            owners = [m for m in self.layout.modules() if any(s.name == name for s in m.parameters)]
            if owners:
                reason = f'it is in module "{owners[0].name}", which is not among the modules'
                cure = "choose it or leave the argument out"
            else:
                known = sorted({s.name for m in self.layout.modules() for s in m.parameters})
                reason = "the schema has no such parameter"
                cure = f"it has {_listed(known)}" if known else "it has none at all"
            raise SchemaError(f'parameter "{name}": {reason}; {cure}', param="parameters")

    def _enter(
        self, parts: Iterable[PlacedPart], enclosing: tuple[PlacedModule | PlacedUnion, ...]
    ) -> None:
        for part in parts:
            match part:
                case PlacedModule():
                    if not part.anonymous:
                        self._enclosing[part.name] = enclosing
                    self._enter(part.parts, (*enclosing, part))
                case PlacedUnion():
                    self._enter(part.members, (*enclosing, part))
                case PlacedScaffold():
                    self._enter(part.members, enclosing)

    def _parts(
        self, parts: Sequence[PlacedPart], encoded: tuple[str, Iterator[int]] | None
    ) -> Iterator[PromptPart]:
        """Yield what is in the prompt of these parts.

        `encoded` has the name that their pieces are computed under, and the numbers of these.
        """
        for part in parts:
            match part:
                case PlacedTokens(token_ids, position):
                    assert encoded is not None
                    name, numbers = encoded
                    number = next(numbers)
                    if len(token_ids) < SHORT_TOKENS:
                        yield LiteralTokens(token_ids, position)
                    else:
                        yield ReusedPiece(name, number, token_ids, position)
                case PlacedParameter():
                    if argument := self._argument(part):
                        yield LiteralTokens(argument, part.position)
                case PlacedModule():
                    if part.anonymous or part.name in self._taken:
                        yield from self._parts(part.parts, (part.name, _numbers(part.pieces)))
                case PlacedUnion():
                    yield from self._parts(part.members, None)
                case PlacedScaffold():
                    if all(member.name in self._taken for member in part.members):
                        together = (part.name, _numbers(part.pieces))
                        for member in part.members:
                            yield from self._parts(member.parts, together)
                    else:
                        yield from self._parts(part.members, None)

    def _argument(self, parameter: PlacedParameter) -> tuple[int, ...]:
        self._used.add(parameter.name)
        given = self.arguments.get(parameter.name)
        if given is None:
            if parameter.default is None:
                raise SchemaError(
                    f'parameter "{parameter.name}" has no default and no argument was given; give '
                    f"one of at most {parameter.length} tokens",
                    param="parameters",
                )
            return parameter.default
        argument = tuple(self.encode(given))
        if len(argument) > parameter.length:
            raise SchemaError(
                f'the argument of "{parameter.name}" has {len(argument)} tokens, its place in the '
                f"schema is {parameter.length}; shorten it, put it into your message, or make the "
                "parameter longer",
                param="parameters",
            )
        return argument

    def _unknown(self, name: str) -> SchemaError:
        close = difflib.get_close_matches(name, self._enclosing, n=1)
        known = list(self._enclosing)
        if close:
            cure = f'did you mean "{close[0]}"?'
        elif known:
            cure = f"it has {_listed(known)}"
        else:
            cure = "it has no modules to choose from"
        return SchemaError(
            f'schema "{self.layout.name}" has no module "{name}"; {cure}', param="modules"
        )

    def _of(self, asked: str, member: str) -> str:
        return f'"{asked}"' if asked == member else f'"{asked}" (inside "{member}")'


def _numbers(pieces: Sequence[PlacedTokens]) -> Iterator[int]:
    return iter(range(len(pieces)))


def _listed(names: Sequence[str], limit: int = 12) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
