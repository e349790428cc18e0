"""Schemas for tests: one that has everything, hypothesis strategies, and a writer of PML."""

from typing import Any
from xml.sax.saxutils import escape, quoteattr

from hypothesis import strategies as st

from prompt_cache.schema import (
    ModuleNode,
    Node,
    ParameterNode,
    ScaffoldNode,
    Schema,
    TextNode,
    UnionNode,
)

TRAVEL = """<?xml version="1.0" encoding="UTF-8"?>
<schema name="travel">
  <!-- the shortest thing that has everything -->
  <system>You are a travel agent. Fish &amp; chips &lt;here&gt;.</system>
  Answer in one line.
  <module name="trip">
    Plan a trip of <parameter name="duration" length="40" default="three days"/>.
    <union>
      <module name="harbour">The harbour town has two beaches and a market.</module>
      <module name="mountains">
        The mountain village.
        It has a lift.
      </module>
    </union>
    Come back at night.
  </module>
  <scaffold>
    <module name="hotel">The hotel has ten rooms.</module>
    <module name="prices">A room costs <parameter name="price" length="20"/> each.</module>
  </scaffold>
</schema>
"""


def encode(text: str) -> list[int]:
    """Return a token for each byte."""
    return list(text.encode())


NAMES = st.text("abcdefgh", min_size=1, max_size=8)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
XML_TEXTS = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufffe\uffff")
    | st.sampled_from("\t\n\r"),
    min_size=1,
    max_size=20,
)


@st.composite
def schema_objects(draw: st.DrawFn, texts: st.SearchStrategy[str] = TEXTS) -> dict[str, Any]:
    """Draw a schema in its JSON form."""
    number = iter(range(10_000))

    def module(depth: int, *, flat: bool = False) -> dict[str, Any]:
        return {"module": f"m{next(number)}", "content": content(depth, flat=flat)}

    def node(depth: int, *, flat: bool) -> Any:
        kinds = ["text", "parameter"]
        if depth < 3 and not flat:
            kinds += ["module", "union", "scaffold"]
        match draw(st.sampled_from(kinds)):
            case "text":
                return draw(texts)
            case "parameter":
                given = draw(st.none() | texts)
                length = draw(st.integers(1, 9)) + len((given or "").encode())
                default = {} if given is None else {"default": given}
                return {"parameter": draw(NAMES), "length": length, **default}
            case "module":
                return module(depth + 1)
            case kind:
                flat = kind == "scaffold"
                return {
                    kind: [module(depth + 1, flat=flat) for _ in range(draw(st.integers(2, 3)))]
                }

    def content(depth: int, *, flat: bool = False) -> list[Any]:
        return [node(depth, flat=flat) for _ in range(draw(st.integers(1, 4)))]

    roles = draw(st.lists(st.sampled_from(["system", "user", "assistant"]), max_size=2))
    return {
        "name": draw(NAMES),
        "content": [*({role: content(0)} for role in roles), *content(0)],
    }


def write_pml(schema: Schema) -> str:
    """Return markup that reads back as the same schema, where XML can have its characters."""
    roles = "".join(f"<{role.role}>{_markup(role.content)}</{role.role}>" for role in schema.roles)
    name = quoteattr(schema.name)
    return f'<schema name={name} xml:space="preserve">{roles}{_markup(schema.content)}</schema>'


def _markup(nodes: tuple[Node, ...]) -> str:
    return "".join(map(_node_markup, nodes))


def _node_markup(node: Node) -> str:
    match node:
        case TextNode(text):
            return escape(text, {"\r": "&#13;"})
        case ParameterNode(name, length, default):
            given = "" if default is None else f" default={quoteattr(default)}"
            return f'<parameter name="{name}" length="{length}"{given}/>'
        case ModuleNode(name, content):
            return f'<module name="{name}">{_markup(content)}</module>'
        case UnionNode(members):
            return f"<union>{_markup(members)}</union>"
        case ScaffoldNode(members):
            return f"<scaffold>{_markup(members)}</scaffold>"
