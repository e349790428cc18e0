"""What PML and JSON say as schemas, what is refused, and with which words."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prompt_cache.errors import SchemaError
from prompt_cache.pml import read_pml
from prompt_cache.read import read_schema
from prompt_cache.schema import (
    MAX_DEPTH,
    ModuleNode,
    ParameterNode,
    Role,
    ScaffoldNode,
    TextNode,
    UnionNode,
)
from prompt_cache.schema_json import read_json, schema_from, schema_object
from tests.prompt_cache.schemas import TRAVEL, XML_TEXTS, schema_objects, write_pml


def test_a_schema_is_read_with_all_that_it_may_have() -> None:
    schema = read_pml(TRAVEL)
    assert schema.name == "travel"
    assert schema.roles == (
        Role("system", (TextNode("You are a travel agent. Fish & chips <here>."),)),
    )
    line, trip, scaffold = schema.content
    assert line == TextNode("Answer in one line.\n")
    assert isinstance(trip, ModuleNode)
    assert trip.content == (
        TextNode("Plan a trip of "),
        ParameterNode("duration", 40, "three days"),
        TextNode(".\n"),
        UnionNode(
            (
                ModuleNode(
                    "harbour", (TextNode("The harbour town has two beaches and a market.\n"),)
                ),
                ModuleNode("mountains", (TextNode("The mountain village.\nIt has a lift.\n"),)),
            )
        ),
        TextNode("Come back at night.\n"),
    )
    assert isinstance(scaffold, ScaffoldNode)
    assert [module.name for module in schema.modules()] == [
        *("trip", "harbour", "mountains", "hotel", "prices")
    ]


def test_the_documentation_says_the_same_in_both_forms() -> None:
    page = (Path(__file__).parents[2] / "docs" / "prompt_cache.md").read_text()
    markup, text = (
        page.partition(f"```{kind}\n")[2].partition("```")[0] for kind in ("xml", "json")
    )
    one, other = read_schema(markup), read_schema(text)
    assert [module.name for module in one.modules()] == [module.name for module in other.modules()]
    assert [role.role for role in one.roles] == [role.role for role in other.roles]
    assert one.content[0] == other.content[0]


def test_space_is_kept_where_it_is_asked_for() -> None:
    schema = read_pml(
        '<schema name="a" xml:space="preserve"> x <module name="m">\n y</module></schema>'
    )
    assert schema.content == (TextNode(" x "), ModuleNode("m", (TextNode("\n y"),)))
    schema = read_pml(
        '<schema name="a"><module name="m" xml:space="preserve"> y </module></schema>'
    )
    assert schema.content == (ModuleNode("m", (TextNode(" y "),)),)


@settings(max_examples=40, deadline=None)
@given(schema_objects())
def test_json_reads_back_as_the_same_schema(value: dict[str, Any]) -> None:
    schema = schema_from(value)
    assert read_json(json.dumps(schema_object(schema))) == schema


@settings(max_examples=40, deadline=None)
@given(schema_objects(XML_TEXTS))
def test_pml_reads_back_as_the_same_schema(value: dict[str, Any]) -> None:
    schema = schema_from(value)
    assert read_pml(write_pml(schema)) == schema
    assert schema_from(schema_object(read_pml(write_pml(schema)))) == schema


@pytest.mark.parametrize("length", [0, True, 10**8, int("9" * 4300), "9" * 9, "x", 1.5, None])
def test_a_length_that_no_argument_has_is_refused(length: object) -> None:
    parameter = {"parameter": "p", "length": length}
    with pytest.raises(SchemaError, match="must be a number of tokens from 1 on, of 8 digits"):
        schema_from({"name": "a", "content": [{"module": "m", "content": [parameter]}]})


def _in_schema(inner: str) -> str:
    return f'<schema name="s">\n{inner}\n</schema>'


PML_FAULTS = {
    "": "no element found",
    "hello": "line 1, column 1: syntax error; the markup is XML",
    '<schema name="s">a & b</schema>': "line 1, column 21: .*&amp;",
    '<schema name="s">': "no element found",
    "<prompt/>": "line 1, prompt: a schema begins with the element schema",
    "<schema>x</schema>": "line 1, schema: it has no name; a name begins with a letter",
    '<schema name="a b">x</schema>': 'schema "a b": a name begins',
    '<schema name="s" mood="x">y</schema>': "no attribute 'mood'; it has name",
    '<schema name="s"/>': "it is empty",
    _in_schema('<module name="a">x</module>\n<module name="a">y</module>'): (
        'line 3, module "a": line 2 has a module of that name; give it another'
    ),
    _in_schema('<module name="a"> </module>'): 'line 2, module "a": it is empty',
    _in_schema("<union>text<module name='a'>x</module></union>"): (
        "line 2, union: it has only modules, no text such as 'text'"
    ),
    _in_schema("<union><module name='a'>x</module></union>"): "a union has two modules or more",
    _in_schema("<union><union/></union>"): "a union has only modules; put it into one",
    _in_schema("<scaffold><module name='a'><module name='b'>x</module></module>"
               "<module name='c'>x</module></scaffold>"): 'its module "a" has modules inside',
    _in_schema('<parameter name="p"/>'): 'line 2, parameter "p": its length must be',
    _in_schema('<parameter name="p" length="0"/>'): "its length must be",
    _in_schema('<parameter name="p" length="9999999999"/>'): "its length must be",
    _in_schema('<parameter name="p" length="3">x</parameter>'): "a parameter has no content",
    _in_schema("<modul name='a'>x</modul>"): "there is no such element; there are schema, module",
    _in_schema("text <system>x</system>"): "text 'text' stands before a role",
    _in_schema("<module name='a'>x</module><user>x</user>"): "it stands before a role",
    _in_schema("<module name='a'><user>x</user></module>"): "a role stands directly in the schema",
    _in_schema("<user/>"): "line 2, user: it has no content",
    _in_schema("<module name='a' xml:space='keep'>x</module>"): "is 'preserve' or 'default'",
    _in_schema("<?php echo ?>"): r"line 2: .*remove <\?php",
}  # fmt: skip


@pytest.mark.parametrize("markup", PML_FAULTS)
def test_what_is_wrong_in_markup_is_named_with_its_line_and_the_cure(markup: str) -> None:
    with pytest.raises(SchemaError, match=PML_FAULTS[markup]):
        read_pml(markup)


@pytest.mark.parametrize(
    "doctype",
    [
        '<!DOCTYPE s [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]>',
        '<!DOCTYPE s [<!ENTITY a SYSTEM "file:///etc/passwd">]>',
        '<!DOCTYPE s SYSTEM "http://example.com/s.dtd">',
        '<!DOCTYPE s [<!ENTITY % p SYSTEM "file:///etc/passwd"> %p;]>',
    ],
)
def test_entities_and_external_references_are_refused(doctype: str) -> None:
    with pytest.raises(SchemaError, match="line 1: a schema has no DOCTYPE and no entities"):
        read_pml(f'{doctype}<schema name="s">&a;</schema>')


def test_bombs_are_refused() -> None:
    deep = '<module name="m">' * 100_000
    with pytest.raises(SchemaError, match=f"nested {MAX_DEPTH} deep at most"):
        read_pml(_in_schema(deep))
    with pytest.raises(SchemaError, match="the limit is 10,000"):
        read_pml(_in_schema('<parameter name="p" length="1"/>' * 10_001))
    with pytest.raises(SchemaError, match="the limit is 16,777,216"):
        read_pml(_in_schema("x" * (16 << 20)))
    with pytest.raises(SchemaError, match="nested 32 deep at most"):
        read_json('{"name": "s", "content": ' + '[{"union": ' * 1000 + "[]" + "}]" * 1000 + "}")
    with pytest.raises(SchemaError, match="nested 32 deep at most"):
        read_json("[" * 1_000_000)


JSON_FAULTS: dict[str, tuple[str, str]] = {
    "no JSON": ("{", "line 1, column 2: "),
    "a list": ("[]", 'a schema is an object such as {"name"'),
    "no name": ("{}", "the schema, schema: it has no name"),
    "content": ('{"name": "s", "content": 3}', "its content must be a text, or a list"),
    "a number": ('{"name": "s", "content": [3]}', "content.0: it must be a text or an object"),
    "two kinds": (
        '{"name": "s", "content": [{"union": [], "module": "a"}]}',
        "an object with one of the fields module, parameter",
    ),
    "an unknown field": (
        '{"name": "s", "content": ["a", {"module": "a", "content": "x", "size": 3}]}',
        "content.1, module \"a\": there is no field 'size'; it has module, content",
    ),
    "a true length": (
        '{"name": "s", "content": [{"parameter": "a", "length": true}]}',
        'content.0, parameter "a": its length must be',
    ),
    "a default that is no text": (
        '{"name": "s", "content": [{"parameter": "a", "length": 1, "default": 1}]}',
        "its default must be text",
    ),
    "a surrogate": ('{"name": "s", "content": "\\ud800"}', "half of a surrogate pair"),
    "a name beside": (
        '{"name": "s", "content": [{"module": "a", "name": "b", "content": "x"}]}',
        "there is no field 'name'; it has module, content",
    ),
}


@pytest.mark.parametrize("fault", JSON_FAULTS)
def test_what_is_wrong_in_json_is_named_with_its_place_and_the_cure(fault: str) -> None:
    text, message = JSON_FAULTS[fault]
    with pytest.raises(SchemaError) as raised:
        read_json(text)
    assert message in str(raised.value)


MARKUP = st.lists(
    st.sampled_from(
        [
            *('<schema name="s">', "</schema>", '<module name="a">', '<module name="b">'),
            *("</module>", "<union>", "</union>", "<scaffold>", "</scaffold>", "<system>"),
            *("</system>", '<parameter name="p" length="2"/>', "<user>", "</user>", "&amp;"),
            *("&#0;", "&lt;", "&x;", "<!-- x -->", "<![CDATA[<]]>", "<?x y?>", "<!DOCTYPE a>"),
            *("\n  ", "text", "<", ">", "é", "\0", "\ud800", 'xml:space="preserve"', "</"),
        ]
    ),
    max_size=30,
).map("".join)


@settings(deadline=None)
@given(MARKUP | st.text() | MARKUP.map(_in_schema))
def test_no_markup_ends_in_anything_but_a_schema_or_an_error(markup: str) -> None:
    try:
        schema = read_pml(markup)
    except SchemaError as error:
        assert str(error)
    else:
        assert schema_from(schema_object(schema)) == schema


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["name", "content", "module", "union", "scaffold", "parameter", "length", "user"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)


@settings(deadline=None)
@given(JSON_VALUES)
def test_no_json_ends_in_anything_but_a_schema_or_an_error(value: object) -> None:
    try:
        schema = schema_from(value)
    except SchemaError as error:
        assert str(error)
    else:
        assert schema_from(schema_object(schema)) == schema
