"""Calls are found in answers however these come, and what is no call stays text."""

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longctx.text.chat_template import ChatPrompts, Message
from longctx.text.tokenizer import Tokenizer
from longctx.text.tool_calls import Tool, ToolCall, ToolCallReader
from tests.support.tiny_tokenizer import HERMES_TEMPLATE, write_tokenizer

WEATHER = '<tool_call>\n{"name": "weather", "arguments": {"city": "Trieste"}}\n</tool_call>'
CITY = ToolCall("weather", '{"city": "Trieste"}')

ANSWERS = {
    "a call": (WEATHER, "", [CITY]),
    "text first": (f"Let me look.\n{WEATHER}", "Let me look.\n", [CITY]),
    "two calls": (f"{WEATHER}\n{WEATHER}\n", "", [CITY, CITY]),
    "a list of calls": (
        '<tool_call>[{"name": "a", "arguments": {}}, {"name": "b"}]</tool_call>',
        "",
        [ToolCall("a", "{}"), ToolCall("b", "{}")],
    ),
    "not closed": (WEATHER.removesuffix("</tool_call>"), "", [CITY]),
    "JSON in JSON": (
        '<tool_call>{"name": "a", "arguments": "{\\"x\\": 1}"}</tool_call>',
        "",
        [ToolCall("a", '{"x": 1}')],
    ),
    "no JSON": ("<tool_call>weather</tool_call> so", "<tool_call>weather</tool_call> so", []),
    "no name": ('<tool_call>{"a": 1}</tool_call>', '<tool_call>{"a": 1}</tool_call>', []),
    "cut short": ('<tool_call>\n{"name": "wea', '<tool_call>\n{"name": "wea', []),
    "a tag begun": ("1 <tool_", "1 <tool_", []),
    "plain": ("There is no tool in this.", "There is no tool in this.", []),
    "nothing": ("", "", []),
}


def read(pieces: list[str]) -> tuple[str, list[ToolCall]]:
    reader = ToolCallReader()
    text, calls = "", []
    for said, found in [*map(reader.push, pieces), reader.finish()]:
        text += said
        calls += found
    assert reader.calls == len(calls)
    return text, calls


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_is_parted_into_text_and_calls(name: str) -> None:
    answer, text, calls = ANSWERS[name]
    assert read([answer]) == (text, calls)


@given(name=st.sampled_from(sorted(ANSWERS)), data=st.data())
def test_it_makes_no_difference_in_which_pieces_it_comes(name: str, data: st.DataObject) -> None:
    answer, text, calls = ANSWERS[name]
    cuts = data.draw(st.lists(st.integers(0, len(answer)), max_size=6).map(sorted))
    edges = [0, *cuts, len(answer)]
    said, found = read([answer[a:b] for a, b in itertools.pairwise(edges)])
    assert (said, found) == (text, calls)


@given(st.text(alphabet='<tool_cal>/{}"nme: \n', max_size=60))
def test_nothing_is_lost_of_what_is_no_call(text: str) -> None:
    said, calls = read(list(text))
    assert said == text or calls


def test_a_conversation_with_calls_is_rendered(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, chat_template=HERMES_TEMPLATE)
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.takes_tools
    tool = Tool(name="weather", description="Of </s> a city", parameters={"type": "object"})
    messages = [
        Message("user", ("How is it?",)),
        Message("assistant", (), (ToolCall("weather", '{"city": "Tri</s>este"}'),)),
        Message("tool", ("Sunny</s>",)),
        Message("tool", ("Warm",)),
    ]
    (piece,) = ChatPrompts(tokenizer).pieces(messages, tools=[tool])
    assert isinstance(piece, tuple)
    text = tokenizer.decode(piece)
    shown = json.dumps(tool.described)
    assert shown in text
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Tri</s>este"}}' in text
    assert "<tool_response>Sunny</s></tool_response>" in text
    assert "<tool_response>Warm</tool_response>" in text  # they are not joined
    # What users wrote is text: the end tokens are the template's own, one for each turn.
    assert piece.count(1) == len(messages)


def test_a_template_without_tools_takes_none(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    assert not Tokenizer(tmp_path).takes_tools
