"""Anthropic's messages over the wire, with the official client."""

import base64
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from api.anthropic.bodies import CountTokensRequest, MessagesRequest
from api.stored_prompts.records import PromptRecords
from tests.api.live_server import MODEL, LiveServer
from tests.support.made_documents import pdf
from tests.support.tiny_models import write_model
from tests.support.tiny_tokenizer import write_tokenizer
from tests.support.tool_templates import HERMES_TEMPLATE
from tests.support.waiting import patient

anthropic = pytest.importorskip("anthropic")

PAGE = Path(__file__).parents[3] / "docs" / "anthropic.md"
ASK = "What is the name of the ship?"
GREEDY: dict[str, Any] = {"model": MODEL, "max_tokens": 8, "extra_body": {"temperature": 0.0}}
RAW: dict[str, Any] = {"max_tokens": 8, "temperature": 0.0}
STORY = "".join(f"Boat number {number} came into the harbour. " for number in range(40))
MARK: Any = {"type": "ephemeral"}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Trieste", "Rijeka"]}, "days": {"enum": [1, 2, 3]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER: Any = {"name": "weather", "description": "Tells the weather", "input_schema": SCHEMA}


def connect(server: LiveServer, key: str = "none") -> Any:
    return anthropic.Anthropic(base_url=server.url, api_key=key, max_retries=0, timeout=patient())


@pytest.fixture
def claude(server: LiveServer) -> Iterator[Any]:
    with connect(server) as connected:
        yield connected


@pytest.fixture(scope="module")
def tools_claude(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("hermes")
    write_model(folder, num_hidden_layers=1, max_position_embeddings=4096)
    write_tokenizer(folder, chat_template=HERMES_TEMPLATE)
    with (
        LiveServer(folder, tmp_path_factory.mktemp("store")) as running,
        connect(running) as connected,
    ):
        yield connected


def user(*blocks: Any) -> Any:
    return {"role": "user", "content": list(blocks)}


def text(words: str, **more: Any) -> Any:
    return {"type": "text", "text": words, **more}


def prompt_tokens(usage: Any) -> int:
    total: int = (
        usage.input_tokens + usage.cache_creation_input_tokens + usage.cache_read_input_tokens
    )
    return total


def test_every_parameter_of_the_official_client_is_known() -> None:
    client = anthropic.Anthropic(api_key="none")
    headers = {"timeout", "workspace_id", "output_format"}  # and one that the client translates
    for call, body in (
        (client.messages.create, MessagesRequest),
        (client.messages.count_tokens, CountTokensRequest),
    ):
        names = {name for name in inspect.signature(call).parameters if name not in headers}
        names = {name for name in names if not name.startswith("extra_")}
        assert names <= set(body.model_fields)


@pytest.mark.parametrize("body", [MessagesRequest, CountTokensRequest])
def test_the_page_says_what_becomes_of_every_field(body: Any) -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert not [name for name in body.model_fields if f"`{name}`" not in page]


# -- answers -------------------------------------------------------------------------------------


def test_a_message_says_what_a_chat_says(server: LiveServer, claude: Any) -> None:
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": ASK}]
    chat = server.http.post("/v1/chat/completions", json={**RAW, "messages": said}).json()
    told = claude.messages.create(
        **GREEDY, system="Be brief.", messages=[{"role": "user", "content": ASK}]
    )
    assert told.role == "assistant" and told.model == MODEL
    assert "".join(block.text for block in told.content) == chat["choices"][0]["message"]["content"]
    assert prompt_tokens(told.usage) == chat["usage"]["prompt_tokens"]
    assert told.usage.output_tokens == chat["usage"]["completion_tokens"]
    cut = chat["choices"][0]["finish_reason"] == "length"
    assert told.stop_reason == ("max_tokens" if cut else "end_turn")
    count = claude.messages.count_tokens(
        model=MODEL, system=[text("Be brief.")], messages=[user(text(ASK))]
    )
    assert count.input_tokens == prompt_tokens(told.usage)


def test_a_stop_sequence_is_told(claude: Any) -> None:
    whole = claude.messages.create(**GREEDY, messages=[user(text(ASK))]).content[0].text
    stop = whole[3:5]
    told = claude.messages.create(**GREEDY, messages=[user(text(ASK))], stop_sequences=["@", stop])
    assert (told.stop_reason, told.stop_sequence) == ("stop_sequence", stop)
    assert "".join(block.text for block in told.content) == whole[: whole.index(stop)]


def test_a_stream_has_the_official_events_in_order(server: LiveServer, claude: Any) -> None:
    wanted = {**GREEDY, "messages": [user(text(ASK))]}
    whole = claude.messages.create(**wanted)
    with claude.messages.stream(**wanted) as stream:
        last = stream.get_final_message()
    assert last.content[0].text == whole.content[0].text
    assert (last.stop_reason, last.stop_sequence) == (whole.stop_reason, whole.stop_sequence)
    assert prompt_tokens(last.usage) == prompt_tokens(whole.usage)
    assert last.usage.output_tokens == whole.usage.output_tokens

    body = {**RAW, "messages": [user(text(ASK))], "stream": True}
    raw = server.http.post("/v1/messages", json=body).text
    pieces = [piece.split("\n") for piece in raw.split("\n\n") if piece]
    names = [name.removeprefix("event: ") for name, _ in pieces]
    assert names == [json.loads(data.removeprefix("data: "))["type"] for _, data in pieces]
    names = [name for name in names if name != "ping"]
    deltas = names.count("content_block_delta")
    assert (
        "event: ping" in raw
        and deltas > 1
        and names
        == [
            "message_start",
            "content_block_start",
            *["content_block_delta"] * deltas,
            "content_block_stop",
            "message_delta",
            "message_stop",
        ]
    )


def test_an_assistants_last_message_is_continued(server: LiveServer, claude: Any) -> None:
    begun = "Her name is"
    said = [{"role": "user", "content": ASK}, {"role": "assistant", "content": begun}]
    told = claude.messages.create(**GREEDY, messages=said)
    body = {**RAW, "messages": said, "continue_final_message": True}
    chat = server.http.post("/v1/chat/completions", json=body).json()
    assert told.content[0].text == chat["choices"][0]["message"]["content"]


def test_an_answer_has_the_form_that_is_asked_for(claude: Any) -> None:
    told = claude.messages.create(
        **{**GREEDY, "max_tokens": 300},
        messages=[user(text("Where?"))],
        output_config={"format": {"type": "json_schema", "schema": SCHEMA}},
    )
    jsonschema.validate(json.loads(told.content[0].text), SCHEMA)
    assert told.stop_reason == "end_turn"


# -- documents and the cache ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["text", "content", "pdf", "file"])
def test_a_document_is_computed_once(server: LiveServer, claude: Any, kind: str) -> None:
    words = f"{kind}. {STORY}"
    if kind == "text":
        source: Any = {"type": "text", "media_type": "text/plain", "data": words}
    elif kind == "content":
        source = {"type": "content", "content": [text(words), text("The end.")]}
    elif kind == "pdf":
        data = base64.b64encode(pdf(*words.split(". "))).decode()
        source = {"type": "base64", "media_type": "application/pdf", "data": data}
    else:
        reply = server.http.post("/v1/files", files={"file": ("a.txt", words)})
        source = {"type": "file", "file_id": reply.json()["id"]}
    document = {"type": "document", "source": source, "cache_control": MARK}
    usages = []
    for question in ("Who came first?", "Who came last, and why so late?"):
        messages = [user(document, text(question))]
        told = claude.messages.create(**GREEDY, messages=messages)
        count = claude.messages.count_tokens(model=MODEL, messages=messages).input_tokens
        assert prompt_tokens(told.usage) == count > 300
        usages.append(told.usage)
    first, second = usages
    # The upload computes the document too, so the first question may find some of it already.
    assert first.cache_creation_input_tokens % 64 == first.cache_read_input_tokens % 64 == 0
    marked = first.cache_creation_input_tokens + first.cache_read_input_tokens
    assert second.cache_read_input_tokens == marked > 250
    assert second.cache_creation_input_tokens == 0


def test_what_is_read_and_written_adds_up(claude: Any) -> None:
    """The question after the mark is long: it is computed into full blocks, and not called so."""
    system = [text(f"Harbour master. {STORY}", cache_control=MARK)]
    long = "And then? " * 60
    first = claude.messages.create(**GREEDY, system=system, messages=[user(text(long))]).usage
    prefix = claude.messages.count_tokens(
        model=MODEL, system=system, messages=[user(text("."))]
    ).input_tokens
    assert first.cache_read_input_tokens == 0
    assert first.cache_creation_input_tokens in range(prefix - 72, prefix + 1)
    assert first.cache_creation_input_tokens % 64 == 0
    assert first.cache_creation.ephemeral_5m_input_tokens == first.cache_creation_input_tokens
    again = claude.messages.create(**GREEDY, system=system, messages=[user(text("So?"))]).usage
    assert again.cache_read_input_tokens == first.cache_creation_input_tokens
    assert again.cache_creation_input_tokens == 0
    unmarked = claude.messages.create(
        **GREEDY, system=[text("." + STORY)], messages=[user(text("So?"))]
    )
    assert unmarked.usage.cache_creation_input_tokens == 0
    whole = claude.messages.create(
        **GREEDY, cache_control=MARK, system="?" + STORY, messages=[user(text("So?"))]
    ).usage
    assert whole.cache_creation_input_tokens == prompt_tokens(whole) // 64 * 64


def test_an_hour_keeps_what_is_marked(server: LiveServer, claude: Any) -> None:
    system = [text(f"An hour. {STORY}", cache_control={"type": "ephemeral", "ttl": "1h"})]
    blocks = [text("Some more. " * 30, cache_control={"type": "ephemeral", "ttl": "5m"}), text("?")]
    usage = claude.messages.create(**GREEDY, system=system, messages=[user(*blocks)]).usage
    made = usage.cache_creation
    assert made.ephemeral_1h_input_tokens > 250 and made.ephemeral_5m_input_tokens > 0
    told = made.ephemeral_1h_input_tokens + made.ephemeral_5m_input_tokens
    assert told == usage.cache_creation_input_tokens
    lengths = [len(record.token_ids) // 4 for record in server.call(_retained(server))]
    assert any(length >= made.ephemeral_1h_input_tokens for length in lengths)


async def _retained(server: LiveServer) -> Any:
    records = PromptRecords(server.config.folder / "prompts.sqlite")
    await records.open()
    try:
        return await records.retained()
    finally:
        await records.close()


# -- tools ---------------------------------------------------------------------------------------


def test_a_tool_is_called_and_answers(tools_claude: Any) -> None:
    asked = {"role": "user", "content": "How is the weather?"}
    wanted = {**GREEDY, "max_tokens": 300, "tools": [WEATHER], "messages": [asked]}
    for choice in ({"type": "tool", "name": "weather"}, {"type": "any"}):
        told = tools_claude.messages.create(**wanted, tool_choice=choice)
        call = told.content[0]
        assert call.type == "tool_use" and call.name == "weather" and told.stop_reason == "tool_use"
        jsonschema.validate(call.input, SCHEMA)
    with tools_claude.messages.stream(**wanted, tool_choice=choice) as stream:
        streamed = stream.get_final_message()
    assert [block.input for block in streamed.content] == [block.input for block in told.content]
    assert streamed.stop_reason == "tool_use"
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [text("Sunny.")]}
    said = [asked, {"role": "assistant", "content": told.content[:1]}, user(result, text("So?"))]
    after = tools_claude.messages.create(**{**wanted, "max_tokens": 6, "messages": said})
    alone = tools_claude.messages.count_tokens(model=MODEL, tools=[WEATHER], messages=[asked])
    assert prompt_tokens(after.usage) > alone.input_tokens + 20
    for choice in ({"type": "auto", "disable_parallel_tool_use": True}, {"type": "none"}):
        free = tools_claude.messages.create(**{**wanted, "max_tokens": 4}, tool_choice=choice)
        assert free.stop_reason in ("max_tokens", "end_turn")


def test_marked_tools_are_found_again(tools_claude: Any) -> None:
    described = {**WEATHER, "description": STORY[:600], "cache_control": MARK}
    usages = []
    for words in ("One question.", "Quite another question."):
        told = tools_claude.messages.create(
            **{**GREEDY, "max_tokens": 2}, tools=[described], messages=[user(text(words))]
        )
        usages.append(told.usage)
    assert usages[0].cache_creation_input_tokens > 0
    first = usages[0]
    marked = first.cache_read_input_tokens + first.cache_creation_input_tokens
    assert usages[1].cache_read_input_tokens == marked


# -- refusals ------------------------------------------------------------------------------------

IMAGE = {"type": "image", "source": {"type": "url", "url": "x"}}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "x"}
USE = {"type": "tool_use", "id": "toolu_1", "name": "a", "input": {}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 40_000}, "max_tokens"),
        ({"messages": [user(IMAGE)]}, "messages[0].content[0]"),
        ({"messages": [user({"type": "thinking", "thinking": "x"})]}, "messages[0].content[0]"),
        (
            {"messages": [user({"type": "document", "source": {"type": "url", "url": "x"}})]},
            "messages[0].content[0].source",
        ),
        (
            {"messages": [user({"type": "document", "source": {"type": "file", "file_id": "f"}})]},
            "messages",
        ),
        (
            {"messages": [user({"type": "document", "source": {"type": "base64", "data": "%"}})]},
            "messages",
        ),
        ({"messages": [user(text("x"), RESULT)]}, "messages"),
        ({"messages": [user(USE)]}, "messages"),
        ({"messages": [{"role": "assistant", "content": [USE]}]}, "messages"),
        (
            {"messages": [user(text("x", cache_control={"type": "ephemeral", "ttl": "2h"}))]},
            "messages[0].content[0].cache_control.ttl",
        ),
        ({"messages": [user(*[text("x", cache_control=MARK)] * 5)]}, ""),
        (
            {
                "system": [text("x", cache_control=MARK)],
                "cache_control": {"type": "ephemeral", "ttl": "1h"},
            },
            "cache_control",
        ),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [WEATHER]}, "tools"),  # this model's template takes none
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "tool", "name": "a"}}, "tool_choice"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"stop_sequences": ["x"] * 65}, "stop_sequences"),
        ({"temperature": -1.0}, "temperature"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
        ({"container": "c"}, "container"),
        ({"output_config": {"effort": "high"}}, "output_config.effort"),
        ({"service_tier": "priority"}, "service_tier"),
        ({"max_completion_tokens": 1}, "max_completion_tokens"),
    ],
)
def test_what_cannot_be_had_is_refused(
    server: LiveServer, fields: dict[str, Any], param: str
) -> None:
    body = {**RAW, "messages": [user(text(ASK))], **fields}
    for stream in (False, True):
        reply = server.http.post("/v1/messages", json={**body, "stream": stream})
        told = reply.json()
        assert reply.status_code in (400, 404), told
        assert told["type"] == "error" and (told["error"]["param"] or "").startswith(param), told
        kind = "not_found_error" if reply.status_code == 404 else "invalid_request_error"
        assert told["error"]["type"] == kind and told["error"]["message"]


def test_errors_are_the_clients_own(
    server: LiveServer, model_folder: Path, tmp_path: Path, claude: Any
) -> None:
    ask = {**GREEDY, "messages": [user(text(ASK))]}
    with pytest.raises(anthropic.NotFoundError) as missing:
        claude.messages.create(**{**ask, "model": "other"})
    assert missing.value.body["error"]["type"] == "not_found_error"
    long = {**ask, "messages": [user(text("word " * 40_000))]}
    with pytest.raises(anthropic.BadRequestError, match="the limit is"):
        claude.messages.create(**long)
    with LiveServer(model_folder, tmp_path, api_key=("right",)) as keyed:
        with connect(keyed, "right") as known:
            assert known.messages.create(**ask).content
        with (
            connect(keyed, "wrong") as unknown,
            pytest.raises(anthropic.AuthenticationError) as caught,
        ):
            unknown.messages.create(**ask)
        assert caught.value.body["error"]["type"] == "authentication_error"
        body = {**RAW, "messages": [user(text(ASK))]}
        headers = {"x-api-key": "right", "anthropic-version": "2023-06-01"}
        assert keyed.http.post("/v1/messages", json=body, headers=headers).status_code == 200
    reply = server.http.get("/v1/messages")
    assert reply.status_code == 405 and reply.json()["type"] == "error"
