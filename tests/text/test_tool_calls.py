"""Calls are found in answers however these come, and what is no call stays text."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longctx.text.tool_calls import CallArguments, CallBegun, Said, ToolCall, ToolCallReader, joined
from longctx.text.tool_forms import ToolForm, Writing

FORMS = {writing: ToolForm(writing=writing) for writing in Writing}
TAGGED, LLAMA, MISTRAL = Writing.TAGGED, Writing.LLAMA, Writing.MISTRAL
NAMES = ("weather", "a", "b")

OBJECT = '{"name": "weather", "arguments": {"city": "Trieste"}}'
WEATHER = f"<tool_call>\n{OBJECT}\n</tool_call>"
LLAMA_OBJECT = OBJECT.replace("arguments", "parameters")
CITY = ToolCall("weather", '{"city": "Trieste"}')
A, B = ToolCall("a", "{}"), ToolCall("b", "{}")
TRICKY = '{"x": "}</tool_call>[\\"{", "y": [{}, [1]]}'

# What a model writes, its text, and its calls.
ANSWERS = {
    (TAGGED, "a call"): (WEATHER, "", [CITY]),
    (TAGGED, "text first"): (f"Let me look.\n{WEATHER}", "Let me look.", [CITY]),
    (TAGGED, "text after"): (f"{WEATHER}\n so", "\n so", [CITY]),
    (TAGGED, "two calls"): (f"{WEATHER}\n{WEATHER}\n", "", [CITY, CITY]),
    (TAGGED, "two calls in one pair"): (
        '<tool_call>{"name": "a"}\n{"name": "b"}</tool_call>',
        "",
        [A, B],
    ),
    (TAGGED, "a list of calls"): (
        '<tool_call>[{"name": "a", "arguments": {}}, {"name": "b"}]</tool_call>',
        "",
        [A, B],
    ),
    (TAGGED, "arguments first"): (
        '<tool_call>{"arguments": {"x": 1}, "name": "a"}</tool_call>',
        "",
        [ToolCall("a", '{"x": 1}')],
    ),
    (TAGGED, "parameters and more"): (
        '<tool_call>{"id": 7, "name": "a", "parameters": {}, "why": {"x": "}"}}</tool_call>',
        "",
        [A],
    ),
    (TAGGED, "tags in a string"): (
        f'<tool_call>{{"name": "a", "arguments": {TRICKY}}}</tool_call>',
        "",
        [ToolCall("a", TRICKY)],
    ),
    (TAGGED, "not closed"): (WEATHER.removesuffix("</tool_call>"), "", [CITY]),
    (TAGGED, "a brace too many"): (f"<tool_call>{OBJECT}}}</tool_call>", "}</tool_call>", [CITY]),
    (TAGGED, "JSON in JSON"): (
        '<tool_call>{"name": "a", "arguments": "{\\"x\\": 1}"}</tool_call>',
        "",
        [ToolCall("a", '{"x": 1}')],
    ),
    (TAGGED, "null"): ('<tool_call>{"name": "a", "arguments": null}</tool_call>', "", [A]),
    (TAGGED, "half a surrogate pair"): (
        '<tool_call>{"name": "a\\ud800", "arguments": "\\udfff"}</tool_call>',
        "",
        [ToolCall("a\ufffd", "\ufffd")],
    ),
    (TAGGED, "cut in the arguments"): (
        '<tool_call>{"name": "a", "arguments": {"x": "1\\',
        "",
        [ToolCall("a", '{"x": "1\\')],
    ),
    (TAGGED, "closed in the arguments"): (
        '<tool_call>{"name": "a", "arguments": {"x": 1</tool_call>',
        "",
        [ToolCall("a", '{"x": 1')],
    ),
    (TAGGED, "a list cut in the second"): (
        '<tool_call>[{"name": "a"}, {"na',
        '{"na',
        [A],
    ),
    (TAGGED, "no JSON, then a call"): (
        f"<tool_call>weather <tool_call>{WEATHER}",
        "<tool_call>weather <tool_call>",
        [CITY],
    ),
    (TAGGED, "no JSON"): (
        "<tool_call>weather</tool_call> so",
        "<tool_call>weather</tool_call> so",
        [],
    ),
    (TAGGED, "no name"): ('<tool_call>{"a": 1}</tool_call>', '<tool_call>{"a": 1}</tool_call>', []),
    (TAGGED, "a name of another kind"): (
        '<tool_call>{"name": 1, "arguments": {}}</tool_call>',
        '<tool_call>{"name": 1, "arguments": {}}</tool_call>',
        [],
    ),
    (TAGGED, "cut short"): ('<tool_call>\n{"name": "wea', '<tool_call>\n{"name": "wea', []),
    (TAGGED, "a tag begun"): ("1 <tool_", "1 <tool_", []),
    (TAGGED, "plain"): ("There is no tool in this. \n", "There is no tool in this. \n", []),
    (TAGGED, "nothing"): ("", "", []),
    (TAGGED, "space"): (" \n", " \n", []),
    (LLAMA, "a call"): (LLAMA_OBJECT, "", [CITY]),
    (LLAMA, "space first"): (f"\n\n{LLAMA_OBJECT}\n", "", [CITY]),
    (LLAMA, "behind the tag"): (f"<|python_tag|>{LLAMA_OBJECT}", "", [CITY]),
    (LLAMA, "text, then the tag"): (f"So: <|python_tag|>{OBJECT}", "So:", [CITY]),
    (LLAMA, "two calls"): (f'{LLAMA_OBJECT}; {{"name": "a", "parameters": {{}}}}', "", [CITY, A]),
    (LLAMA, "two calls in lines"): (f"{LLAMA_OBJECT}\n{LLAMA_OBJECT}", "", [CITY, CITY]),
    (LLAMA, "two calls with tags"): (
        f"<|python_tag|>{LLAMA_OBJECT}; <|python_tag|>{LLAMA_OBJECT}",
        "",
        [CITY, CITY],
    ),
    (LLAMA, "with a type"): (
        '{"type": "function", "function": "a", "parameters": {"x": 1}}',
        "",
        [ToolCall("a", '{"x": 1}')],
    ),
    (LLAMA, "a name of no tool"): (
        '{"name": "Ana", "parameters": {}}',
        '{"name": "Ana", "parameters": {}}',
        [],
    ),
    (LLAMA, "a name of no tool behind the tag"): (
        '<|python_tag|>{"name": "Ana", "parameters": {}}',
        "",
        [ToolCall("Ana", "{}")],
    ),
    (LLAMA, "other JSON"): ('{"city": "Trieste"} ', '{"city": "Trieste"} ', []),
    (LLAMA, "in the text"): (f"Call {LLAMA_OBJECT}", f"Call {LLAMA_OBJECT}", []),
    (LLAMA, "code"): ('<|python_tag|>print("{}")', '<|python_tag|>print("{}")', []),
    (LLAMA, "text after"): (f"{LLAMA_OBJECT}; so", "; so", [CITY]),
    (LLAMA, "plain"): (" Nothing; to call.", " Nothing; to call.", []),
    (MISTRAL, "a list"): (f"[TOOL_CALLS] [{OBJECT}, {OBJECT}]", "", [CITY, CITY]),
    (MISTRAL, "a list with ids"): (
        '[TOOL_CALLS][{"name": "a", "arguments": {}, "id": "0123abcde"}]',
        "",
        [A],
    ),
    (MISTRAL, "a name"): ('[TOOL_CALLS]weather{"city": "Trieste"}', "", [CITY]),
    (MISTRAL, "names with marks"): (
        'Now [TOOL_CALLS]weather[ARGS]{"city": "Trieste"}[TOOL_CALLS]a[CALL_ID]0aB[ARGS]{}',
        "Now",
        [CITY, A],
    ),
    (MISTRAL, "one object"): (f"[TOOL_CALLS]{OBJECT}", "", [CITY]),
    (MISTRAL, "no call"): ("[TOOL_CALLS] weather.", "[TOOL_CALLS] weather.", []),
    (MISTRAL, "no list"): ("[TOOL_CALLS] [1, 2]", "[TOOL_CALLS] [1, 2]", []),
    (MISTRAL, "a long name"): (f"[TOOL_CALLS]{'a' * 300}{{}}", f"[TOOL_CALLS]{'a' * 300}{{}}", []),
    (MISTRAL, "a mark begun"): ("see [TOOL", "see [TOOL", []),
}


def read(writing: Writing, pieces: list[str]) -> tuple[str, list[ToolCall]]:
    reader = ToolCallReader(FORMS[writing], NAMES)
    events = [event for piece in pieces for event in reader.push(piece)] + reader.finish()
    text, calls = joined(events)
    assert reader.calls == len(calls)
    return text, calls


@pytest.mark.parametrize(("writing", "name"), ANSWERS)
def test_an_answer_is_parted_into_text_and_calls(writing: Writing, name: str) -> None:
    answer, text, calls = ANSWERS[writing, name]
    assert read(writing, [answer]) == (text, calls)


@pytest.mark.parametrize(("writing", "name"), ANSWERS)
def test_wherever_it_is_split_it_says_the_same(writing: Writing, name: str) -> None:
    answer, text, calls = ANSWERS[writing, name]
    assert read(writing, list(answer)) == (text, calls)
    for cut in range(len(answer)):
        assert read(writing, [answer[:cut], answer[cut:]]) == (text, calls), cut


@given(name=st.sampled_from(list(ANSWERS)), data=st.data())
def test_it_makes_no_difference_in_which_pieces_it_comes(
    name: tuple[Writing, str], data: st.DataObject
) -> None:
    answer, text, calls = ANSWERS[name]
    cuts = data.draw(st.lists(st.integers(0, len(answer)), max_size=6).map(sorted))
    edges = [0, *cuts, len(answer)]
    pieces = [answer[a:b] for a, b in itertools.pairwise(edges)]
    assert read(name[0], pieces) == (text, calls)


BITS = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "[ARGS]"),
        *('{"name": "a"', '"arguments": ', '"parameters": ', "{", "}", "[", "]", '"', "\\", ":1"),
        *(",", ";", " ", "\n", "a"),
    ]
)


@given(writing=st.sampled_from(list(Writing)), bits=st.lists(BITS, max_size=30), data=st.data())
def test_anything_is_read_the_same_in_any_pieces(
    writing: Writing, bits: list[str], data: st.DataObject
) -> None:
    answer = "".join(bits)
    whole = read(writing, [answer])
    cuts = data.draw(st.lists(st.integers(0, len(answer)), max_size=9).map(sorted))
    edges = [0, *cuts, len(answer)]
    assert read(writing, [answer[a:b] for a, b in itertools.pairwise(edges)]) == whole
    assert read(writing, list(answer)) == whole
    if not whole[1]:
        assert whole[0] == answer  # nothing is lost of what is no call


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@given(
    writing=st.sampled_from(list(Writing)),
    arguments=st.dictionaries(st.text(max_size=9), JSON_VALUES, max_size=3),
    ascii_only=st.booleans(),
    piece=st.integers(1, 9),
)
def test_arguments_come_back_as_they_were_written(
    writing: Writing, arguments: dict[str, object], ascii_only: bool, piece: int
) -> None:
    written = json.dumps(arguments, ensure_ascii=ascii_only)
    entry = f'{{"name": "a", "arguments": {written}}}'
    answer = {
        Writing.TAGGED: f"<tool_call>\n{entry}\n</tool_call>",
        Writing.TAGGED_LIST: f"<tool_call>[{entry}]</tool_call>",
        Writing.LLAMA: entry,
        Writing.MISTRAL_LIST: f"[TOOL_CALLS] [{entry}]",
        Writing.MISTRAL: f"[TOOL_CALLS]a[ARGS]{written}",
    }[writing]
    pieces = [answer[begin : begin + piece] for begin in range(0, len(answer), piece)]
    assert read(writing, pieces) == ("", [ToolCall("a", written)])


def test_a_name_is_told_before_its_arguments_and_these_as_they_come() -> None:
    reader = ToolCallReader(FORMS[TAGGED])
    assert reader.push("Now.\n<tool_call>") == [Said("Now.")]
    assert reader.push('{"name": "weather"') == []
    assert reader.push(', "arguments": {"ci') == [CallBegun("weather"), CallArguments('{"ci')]
    assert reader.push('ty": "Tri') == [CallArguments('ty": "Tri')]
    assert reader.push('este"}}') == [CallArguments('este"}')]
    assert reader.push("</tool_call>") == reader.finish() == []


@pytest.mark.parametrize("text", ["<tool_call>[" * 9000, '<tool_call>{"a": "' * 9000, "{" * 99_999])
def test_a_hostile_answer_takes_no_square_of_time(text: str) -> None:
    assert read(TAGGED, [text[i : i + 64] for i in range(0, len(text), 64)]) == (text, [])
