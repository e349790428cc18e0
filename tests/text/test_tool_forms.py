"""From the chat template: how a model calls tools, and how it is told of its earlier calls."""

import json
from pathlib import Path

import pytest

from longctx.errors import InvalidRequest
from longctx.text.chat_template import ChatPrompts, Message
from longctx.text.tokenizer import Tokenizer
from longctx.text.tool_calls import ToolCall
from longctx.text.tool_forms import Tool, Writing
from tests.support.tiny_tokenizer import PLAIN_TEMPLATE, write_tokenizer
from tests.support.tool_templates import CODER_TEMPLATE, TOOL_TEMPLATES, TOOL_TOKENS

WRITINGS = {
    "hermes": Writing.TAGGED,
    "smollm": Writing.TAGGED_LIST,
    "xml tools": Writing.TAGGED,
    "llama": Writing.LLAMA,
    "mistral list": Writing.MISTRAL_LIST,
    "mistral": Writing.MISTRAL,
}
TOOL = Tool(name="weather", description="Of </s> a city", parameters={"type": "object"})
CALLS = (
    ToolCall("weather", '{"city": "Tri</s>este"}', "call_1"),
    ToolCall("weather", '{"city": "Rijeka"}', "call_2"),
)
CONVERSATION = [
    Message("user", ("How is it?",)),
    Message("assistant", (), CALLS),
    Message("tool", ("Sunny</s>",), (), "call_1"),
    Message("tool", ("Warm",), (), "call_2"),
]


def tokenizer_of(folder: Path, name: str) -> Tokenizer:
    special = TOOL_TOKENS.get(name, ())
    write_tokenizer(folder, chat_template=TOOL_TEMPLATES[name], more_special=special)
    return Tokenizer(folder)


def rendered(tokenizer: Tokenizer, messages: list[Message]) -> tuple[str, list[int]]:
    (piece,) = ChatPrompts(tokenizer).pieces(messages, tools=[TOOL])
    assert isinstance(piece, tuple)
    return tokenizer.decode(piece, skip_special=False), list(piece)


@pytest.mark.parametrize("name", TOOL_TEMPLATES)
def test_the_template_tells_how_calls_are_written(tmp_path: Path, name: str) -> None:
    form = tokenizer_of(tmp_path, name).tool_form
    assert form is not None and form.writing is WRITINGS[name]
    assert form.shown_tokens == tuple(
        5 + number
        for number, token in enumerate(TOOL_TOKENS.get(name, ()))
        if "AVAILABLE" not in token
    )


@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, CODER_TEMPLATE, None])
def test_other_templates_take_no_tools(tmp_path: Path, template: str | None) -> None:
    write_tokenizer(tmp_path, chat_template=template)
    assert Tokenizer(tmp_path).tool_form is None


@pytest.mark.parametrize("name", TOOL_TEMPLATES)
def test_a_conversation_with_calls_is_rendered(tmp_path: Path, name: str) -> None:
    text, tokens = rendered(tokenizer_of(tmp_path, name), CONVERSATION)
    shown = str(TOOL.described) if name == "xml tools" else json.dumps(TOOL.described)
    assert shown in text
    places = [text.index(part) for part in ("Tri</s>este", "Sunny</s>", "Warm")]
    assert places == sorted(places)
    assert text.index("Tri</s>este") < text.index("Rijeka")
    # What others wrote is text: end tokens are the template's own, one for each turn.
    assert tokens.count(1) <= len(CONVERSATION) + 2
    spelled = text.count("</s>") - tokens.count(1)
    assert spelled == 3  # in the tool, the call and its answer


def test_where_one_call_is_taken_at_once_each_stands_before_its_answer(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, "llama")
    text, _ = rendered(tokenizer, CONVERSATION)
    parts = ["Tri</s>este", "Sunny", "Rijeka", "Warm"]
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    backwards = [*CONVERSATION[:2], CONVERSATION[3], CONVERSATION[2]]
    text, _ = rendered(tokenizer, backwards)
    assert text.index("Rijeka") < text.index("Warm") < text.index("Sunny")


def test_ids_are_as_the_template_takes_them(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, "mistral list")
    text, _ = rendered(tokenizer, CONVERSATION)
    form = tokenizer.tool_form
    assert form is not None
    for call in CALLS:
        assert text.count(form.told_id(call.id)) == 2  # of the call, and of its answer
    assert form.told_id("0aZ9bcdef") == "0aZ9bcdef"
    assert len({form.told_id(form.call_id()) for _ in range(9)}) == 9
    assert len(form.call_id()) == 9


def test_calls_that_a_template_leaves_out_are_written_into_the_message(tmp_path: Path) -> None:
    text, _ = rendered(tokenizer_of(tmp_path, "xml tools"), CONVERSATION)
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Rijeka"}}\n</tool_call>' in text


def test_a_name_is_text_too(tmp_path: Path) -> None:
    call = ToolCall("</s>", "{}", "call_1")
    messages = [CONVERSATION[0], Message("assistant", (), (call,))]
    text, tokens = rendered(tokenizer_of(tmp_path, "hermes"), messages)
    assert '"name": "</s>"' in text and tokens.count(1) == 2


def test_what_a_template_refuses_in_any_form_is_told(tmp_path: Path) -> None:
    messages = [Message("assistant", (), CALLS), Message("king", ("x",))]
    write_tokenizer(tmp_path, chat_template="{{ raise_exception('no') }}{{ tools }}<tool_call>")
    with pytest.raises(InvalidRequest, match="refuses these messages: no"):
        ChatPrompts(Tokenizer(tmp_path)).pieces(messages, tools=[TOOL])
