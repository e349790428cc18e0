"""Prompt schemas: the text that prompts are made of, cut into modules that are computed once.

    <schema name="travel">
      <system>You are a travel agent.</system>
      <module name="trip">
        Plan a trip of <parameter name="duration" length="8" default="three days"/>.
      </module>
      <union>
        <module name="harbour">...</module>
        <module name="mountains">...</module>
      </union>
    </schema>

A prompt always has the text outside of modules. It has modules by name, and at most one member of a
union. Both written forms, PML (`pml.py`) and JSON (`schema_json.py`), are read into `Element`s and
from these, by the one set of rules below, into the frozen types. Positions follow in `layout.py`.

Source: Prompt Cache, https://arxiv.org/abs/2311.04934, section 3.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, cast

from prompt_cache.errors import SchemaError

ROLES = ("system", "user", "assistant")
MAX_NAME_CHARACTERS = 64
MAX_BYTES = 16 << 20
MAX_DEPTH = 32
MAX_ELEMENTS = 10_000
MAX_LENGTH_DIGITS = 8  # of a parameter's length

_NAME = re.compile(rf"[^\W\d][\w.-]{{0,{MAX_NAME_CHARACTERS - 1}}}")
_NAME_RULE = (
    "a name begins with a letter and has letters, digits, '_', '-' and '.', "
    f"at most {MAX_NAME_CHARACTERS}"
)

RoleName = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class TextNode:
    """Text that is taken as it is."""

    text: str


@dataclass(frozen=True, slots=True)
class ParameterNode:
    """Room for an argument of at most `length` tokens. Equal names get the same argument."""

    name: str
    length: int
    default: str | None = None
    where: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class ModuleNode:
    """Text that is computed once, and further modules that may only be chosen with it."""

    name: str
    content: tuple["Node", ...]
    where: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class UnionNode:
    """Modules of which a prompt has at most one, since they take the same positions."""

    members: tuple[ModuleNode, ...]
    where: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class ScaffoldNode:
    """Modules that are also computed together, as one, for prompts that have all of them."""

    members: tuple[ModuleNode, ...]
    where: str = field(default="", compare=False)


Node: TypeAlias = TextNode | ParameterNode | ModuleNode | UnionNode | ScaffoldNode


@dataclass(frozen=True, slots=True)
class Role:
    """One of the messages that every prompt begins with."""

    role: RoleName
    content: tuple[Node, ...]
    where: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Schema:
    """The messages of `roles`, then `content`, with which the request's first message begins."""

    name: str
    roles: tuple[Role, ...]
    content: tuple[Node, ...]
    where: str = field(default="", compare=False)

    def modules(self) -> Iterator[ModuleNode]:
        """Yield all modules, those inside others too, in reading order."""
        for role in self.roles:
            yield from _modules(role.content)
        yield from _modules(self.content)


@dataclass(slots=True)
class Element:
    """One element of either written form, to which no rule has been applied yet."""

    tag: str
    attributes: dict[str, object]
    where: str  # as errors name it: "line 3", "content.1"
    children: "list[str | Element]" = field(default_factory=list)

    @property
    def label(self) -> str:
        """The element as errors name it: `line 3, module "trip"`."""
        name = self.attributes.get("name")
        return f"{self.where}, {self.tag}" + (f' "{name}"' if isinstance(name, str) else "")

    def fault(self, what: str) -> SchemaError:
        """Return an error that says where and what; the caller raises it."""
        return SchemaError(f"{self.label}: {what}")


def schema_of(root: Element) -> Schema:
    """Return the schema of a root element. Raises SchemaError for the first rule it breaks."""
    return _Reader().schema(root)


@dataclass(slots=True)
class _Reader:
    """Applies the rules to the elements of one schema; `named` has its modules so far."""

    named: dict[str, Element] = field(default_factory=dict)

    def schema(self, root: Element) -> Schema:
        if root.tag != "schema":
            raise root.fault("a schema begins with the element schema; put everything in one")
        name = self._name(root, ("name",))
        last = max((i for i, child in enumerate(root.children) if _is_role(child)), default=-1)
        roles = []
        for child in root.children[: last + 1]:
            if isinstance(child, Element) and child.tag in ROLES:
                self._only(child, ())
                content = self._content(child, child.children)
                if not content:
                    raise child.fault("it has no content; write some or leave it out")
                roles.append(Role(cast(RoleName, child.tag), content, child.where))
            elif isinstance(child, Element):
                raise child.fault("it stands before a role; put it into one, or after the last")
            elif child.strip():
                raise root.fault(
                    f"text {_excerpt(child)} stands before a role; put it into one, or after the "
                    "last"
                )
        content = self._content(root, root.children[last + 1 :])
        if not roles and not content:
            raise root.fault("it is empty; write text or modules in it")
        return Schema(name, tuple(roles), content, root.where)

    def _content(self, parent: Element, children: Iterable[str | Element]) -> tuple[Node, ...]:
        nodes: list[Node] = []
        for child in children:
            if isinstance(child, str):
                _check_unicode(parent, child)
                if nodes and isinstance(nodes[-1], TextNode):
                    nodes[-1] = TextNode(nodes[-1].text + child)
                elif child:
                    nodes.append(TextNode(child))
            elif child.tag == "parameter":
                nodes.append(self._parameter(child))
            elif child.tag == "module":
                nodes.append(self._module(child))
            elif child.tag == "union":
                nodes.append(UnionNode(self._members(child), child.where))
            elif child.tag == "scaffold":
                nodes.append(ScaffoldNode(self._scaffolded(child), child.where))
            elif child.tag in ROLES:
                raise child.fault("a role stands directly in the schema, not in another element")
            else:
                raise child.fault(
                    "there is no such element; there are schema, module, union, scaffold, "
                    f"parameter, {', '.join(ROLES)}"
                )
        return tuple(nodes)

    def _module(self, element: Element) -> ModuleNode:
        name = self._name(element, ("name",))
        known = self.named.setdefault(name, element)
        if known is not element:
            raise element.fault(f"{known.where} has a module of that name; give it another")
        content = self._content(element, element.children)
        if not content:
            raise element.fault("it is empty; write text in it or leave it out")
        return ModuleNode(name, content, element.where)

    def _members(self, element: Element) -> tuple[ModuleNode, ...]:
        self._only(element, ())
        members = []
        for child in element.children:
            if isinstance(child, Element) and child.tag == "module":
                members.append(self._module(child))
            elif isinstance(child, Element):
                raise child.fault(f"a {element.tag} has only modules; put it into one")
            elif child.strip():
                raise element.fault(
                    f"it has only modules, no text such as {_excerpt(child)}; put it into one"
                )
        if len(members) < 2:
            raise element.fault(f"a {element.tag} has two modules or more; add some or take it out")
        return tuple(members)

    def _scaffolded(self, element: Element) -> tuple[ModuleNode, ...]:
        members = self._members(element)
        for member in members:
            if not all(isinstance(node, TextNode | ParameterNode) for node in member.content):
                raise element.fault(
                    f'its module "{member.name}" has modules inside; a scaffold\'s have only text '
                    "and parameters: put the others beside it"
                )
        return members

    def _parameter(self, element: Element) -> ParameterNode:
        name = self._name(element, ("name", "length", "default"))
        if element.children:
            raise element.fault("a parameter has no content; its text is the attribute default")
        length, default = element.attributes.get("length"), element.attributes.get("default")
        if isinstance(length, str) and length.isascii() and length.isdigit():
            length = int(length) if len(length) <= MAX_LENGTH_DIGITS else None
        too_long = isinstance(length, int) and length >= 10**MAX_LENGTH_DIGITS
        if not isinstance(length, int) or isinstance(length, bool) or length < 1 or too_long:
            raise element.fault(
                f"its length must be a number of tokens from 1 on, of {MAX_LENGTH_DIGITS} digits "
                "at most: as long as the longest argument"
            )
        if default is not None and not isinstance(default, str):
            raise element.fault("its default must be text")
        _check_unicode(element, default or "")
        return ParameterNode(name, length, default, element.where)

    def _name(self, element: Element, allowed: tuple[str, ...]) -> str:
        self._only(element, allowed)
        name = element.attributes.get("name")
        if not isinstance(name, str):
            raise element.fault(f"it has no name; {_NAME_RULE}")
        if not _NAME.fullmatch(name):
            raise element.fault(_NAME_RULE)
        return name

    def _only(self, element: Element, allowed: tuple[str, ...]) -> None:
        for name in element.attributes:
            if name not in allowed:
                has = f"it has {', '.join(allowed)}" if allowed else "it has none"
                raise element.fault(f"there is no attribute {name!r}; {has}")


def _modules(nodes: Iterable[Node]) -> Iterator[ModuleNode]:
    for node in nodes:
        match node:
            case ModuleNode():
                yield node
                yield from _modules(node.content)
            case UnionNode() | ScaffoldNode():
                yield from _modules(node.members)


def _is_role(child: str | Element) -> bool:
    return isinstance(child, Element) and child.tag in ROLES


def _check_unicode(element: Element, text: str) -> None:
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise element.fault("the text holds half of a surrogate pair, no character; remove it")


def _excerpt(text: str, limit: int = 30) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= limit else text[: limit - 3] + "...")
