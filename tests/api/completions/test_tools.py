"""Tools over the wire: offered, called with arguments that fit, streamed, answered, refused."""

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest

from tests.api.live_server import MODEL, LiveServer
from tests.support.tiny_models import write_model
from tests.support.tiny_tokenizer import write_tokenizer
from tests.support.tool_templates import TOOL_TEMPLATES, TOOL_TOKENS

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Trieste", "Rijeka"]}, "days": {"enum": [1, 2, 3]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


def function(name: str, **more: Any) -> Any:
    return {"type": "function", "function": {"name": name, **more}}


WEATHER = function("weather", description="Tells the weather", parameters=SCHEMA)
CLOCK = function("clock")  # without parameters
ASK: Any = [{"role": "user", "content": "How is the weather in Trieste?"}]
CHAT: dict[str, Any] = {"model": MODEL, "messages": ASK, "tools": [WEATHER, CLOCK], "seed": 1}
SCHEMAS = {"weather": SCHEMA, "clock": {"const": {}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}


@pytest.fixture(scope="module", params=TOOL_TEMPLATES)
def tools_server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    name = request.param
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, num_hidden_layers=1, max_position_embeddings=4096)
    special = TOOL_TOKENS.get(name, ())
    write_tokenizer(folder, chat_template=TOOL_TEMPLATES[name], more_special=special)
    with LiveServer(folder, tmp_path_factory.mktemp("store")) as running:
        yield running


@pytest.fixture
def tools_client(tools_server: LiveServer) -> Iterator[openai.OpenAI]:
    with tools_server.openai() as connected:
        yield connected


def check(calls: Any) -> None:
    for call in calls:
        assert call.type == "function" and len(call.id) >= 9
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])


@pytest.mark.parametrize("seed", range(2))
def test_a_required_call_fits_its_schema(tools_client: openai.OpenAI, seed: int) -> None:
    answer = tools_client.chat.completions.create(
        **{**CHAT, "seed": seed},
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=300,
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    assert choice.message.tool_calls is not None and len(choice.message.tool_calls) == 1
    check(choice.message.tool_calls)


def test_a_named_tool_is_called(tools_client: openai.OpenAI) -> None:
    answer = tools_client.chat.completions.create(
        **CHAT, tool_choice={"type": "function", "function": {"name": "weather"}}, max_tokens=300
    )
    calls = answer.choices[0].message.tool_calls
    assert calls is not None
    assert [call.function.name for call in calls] == ["weather"]  # type: ignore[union-attr]
    check(calls)


def test_several_calls_may_follow_each_other(tools_client: openai.OpenAI) -> None:
    counts = set()
    for seed in range(4):
        answer = tools_client.chat.completions.create(
            **{**CHAT, "tools": [WEATHER], "seed": seed},
            tool_choice="required",
            max_tokens=400,
            logit_bias={"1": -3},
        )
        calls = answer.choices[0].message.tool_calls
        assert calls
        whole = answer.choices[0].finish_reason == "tool_calls"
        check(calls if whole else calls[:-1])  # the last one may be cut short
        counts.add(len(calls))
    assert max(counts) > 1


def test_a_stream_has_the_same_calls(tools_client: openai.OpenAI) -> None:
    wanted = {**CHAT, "tools": [WEATHER], "tool_choice": "required", "n": 2, "max_tokens": 300}
    whole = tools_client.chat.completions.create(**wanted)
    calls: dict[int, list[Any]] = {0: [], 1: []}
    ends: dict[int, str] = {}
    texts = ["", ""]
    pieces = 0
    for chunk in tools_client.chat.completions.create(**wanted, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        for call in choice.delta.tool_calls or ():
            assert call.function is not None
            if call.id is not None:  # it begins here, and has its name
                assert call.index == len(calls[choice.index]) and call.type == "function"
                calls[choice.index].append((call.function.name, ""))
            else:
                assert call.index == len(calls[choice.index]) - 1 and call.function.name is None
            name, arguments = calls[choice.index][call.index]
            calls[choice.index][call.index] = (name, arguments + (call.function.arguments or ""))
            pieces += 1
        if choice.finish_reason:
            ends[choice.index] = choice.finish_reason
    for choice in whole.choices:
        said = [(c.function.name, c.function.arguments) for c in choice.message.tool_calls or ()]  # type: ignore[union-attr]
        assert calls[choice.index] == said != []
        assert texts[choice.index] == (choice.message.content or "")
        assert pieces > 2 * sum(map(len, calls.values()))  # they came bit by bit
        assert ends[choice.index] == choice.finish_reason


def test_strict_arguments_fit_also_where_nothing_has_to_be_called(
    tools_client: openai.OpenAI,
) -> None:
    strict = function("weather", parameters=SCHEMA, strict=True)
    for seed in range(3):
        answer = tools_client.chat.completions.create(
            **{**CHAT, "tools": [strict], "seed": seed}, max_tokens=60
        )
        check(answer.choices[0].message.tool_calls or ())


@pytest.mark.parametrize("choice", ["auto", "none"])
def test_text_is_an_answer_too(tools_client: openai.OpenAI, choice: Any) -> None:
    answer = tools_client.chat.completions.create(**CHAT, tool_choice=choice, max_tokens=8)
    assert answer.choices[0].message.content and not answer.choices[0].message.tool_calls
    told = {**CHAT, "tools": []} if choice == "none" else CHAT
    again = tools_client.chat.completions.create(**told, max_tokens=8)
    assert again.choices[0].message.content == answer.choices[0].message.content


def test_a_tool_answers(tools_client: openai.OpenAI) -> None:
    messages: Any = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "It is noon."},
    ]
    answer = tools_client.chat.completions.create(**{**CHAT, "messages": messages}, max_tokens=6)
    alone = tools_client.chat.completions.create(**CHAT, max_tokens=6)
    assert answer.usage is not None and alone.usage is not None
    assert answer.usage.prompt_tokens > alone.usage.prompt_tokens + 10


DEEP: Any = {}
for _ in range(120):
    DEEP = {"items": DEEP}


@pytest.mark.parametrize("tools_server", ["hermes"], indirect=True)
@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"tools": [WEATHER, WEATHER]}, "two functions of one name"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": [{"type": "function"}]}, "tools[0].function is required"),
        ({"tools": [function("a b")]}, "tools[0].function.name"),
        ({"tools": [function("a", parameters=[])]}, "tools[0].function.parameters"),
        ({"tools": [function(f"f{n}") for n in range(129)]}, "tools"),
        ({"tools": [], "tool_choice": "required"}, "there are no tools"),
        ({"tool_choice": function("other")}, "not among the tools"),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "excludes tools"),
        ({"tool_choice": "required", "tools": [function("a", parameters=DEEP)]}, "levels deep"),
        (
            {
                "tool_choice": "required",
                "tools": [function("a", parameters={"type": "nonsense"})],
            },
            "cannot be followed",
        ),
        ({"messages": [*ASK, {"role": "tool", "content": "x"}]}, "tool_call_id"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "tool_calls"),
        (
            {
                "messages": [
                    *ASK,
                    {
                        "role": "assistant",
                        "tool_calls": [
                            {"id": "a", "function": {"name": "clock", "arguments": "[]"}}
                        ],
                    },
                ]
            },
            "is not a JSON object",
        ),
    ],
)
def test_what_cannot_be_called_is_refused(
    tools_server: LiveServer, fields: dict[str, Any], says: str
) -> None:
    reply = tools_server.http.post("/v1/chat/completions", json={**CHAT, **fields})
    assert reply.status_code == 400, reply.text
    assert says in reply.json()["error"]["message"]


def test_a_model_whose_template_knows_no_tools_is_offered_none(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="no place for tools") as caught:
        client.chat.completions.create(**CHAT)
    assert caught.value.param == "tools"


def test_tokens_are_counted_with_tools(tools_server: LiveServer) -> None:
    body = {"messages": ASK, "tools": [WEATHER, CLOCK]}
    told = tools_server.http.post("/tokenize", json=body).json()
    without = tools_server.http.post("/tokenize", json={"messages": ASK}).json()
    assert told["count"] > without["count"] + 20
    asked = {**body, "max_tokens": 0}
    answer = tools_server.http.post("/v1/chat/completions", json=asked).json()
    assert answer["usage"]["prompt_tokens"] == told["count"]


def test_tools_belong_to_messages(server: LiveServer) -> None:
    # The second is refused since the template knows none.
    for body in ({"prompt": "x", "tools": [CLOCK]}, {"messages": ASK, "tools": [CLOCK]}):
        reply = server.http.post("/tokenize", json=body)
        assert reply.status_code == 400 and reply.json()["error"]["param"] == "tools"
