"""Responses over the wire, with the official client: whole, streamed, gone on from, refused."""

import base64
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest

from api.responses.bodies import InputTokensRequest, ResponseRequest
from tests.api.live_server import MODEL, LiveServer
from tests.support.tiny_models import write_model
from tests.support.tiny_tokenizer import write_tokenizer
from tests.support.tool_templates import HERMES_TEMPLATE

PAGE = Path(__file__).parents[3] / "docs" / "openai.md"
ASK = "What is the name of the ship?"
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0.0, "max_output_tokens": 8}
STORY = "".join(f"Boat number {number} came into the harbour. " for number in range(40))
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Trieste", "Rijeka"]}, "days": {"enum": [1, 2, 3]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER: Any = {"type": "function", "name": "weather", "parameters": SCHEMA, "strict": True}


@pytest.fixture(scope="module")
def tools_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    folder = tmp_path_factory.mktemp("hermes")
    write_model(folder, num_hidden_layers=1, max_position_embeddings=4096)
    write_tokenizer(folder, chat_template=HERMES_TEMPLATE)
    with (
        LiveServer(folder, tmp_path_factory.mktemp("store")) as running,
        running.openai() as connected,
    ):
        yield connected


def test_every_parameter_of_the_official_client_is_known() -> None:
    client = openai.OpenAI(api_key="none")
    for call, body in (
        (client.responses.create, ResponseRequest),
        (client.responses.input_tokens.count, InputTokensRequest),
    ):
        names = {name for name in inspect.signature(call).parameters if name != "timeout"}
        names = {name for name in names if not name.startswith("extra_")}
        assert names <= set(body.model_fields)


@pytest.mark.parametrize("body", [ResponseRequest, InputTokensRequest])
def test_the_page_says_what_becomes_of_every_field(body: Any) -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert not [name for name in body.model_fields if f"`{name}`" not in page]


# -- answers -------------------------------------------------------------------------------------


def test_a_response_says_what_a_chat_says(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model=MODEL,
        temperature=0,
        max_tokens=8,
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": ASK},
        ],
    )
    told = client.responses.create(**GREEDY, input=ASK, instructions="Be brief.")
    assert told.output_text == chat.choices[0].message.content
    assert told.usage is not None and chat.usage is not None
    assert told.usage.input_tokens == chat.usage.prompt_tokens
    assert told.usage.output_tokens == chat.usage.completion_tokens
    assert told.usage.total_tokens == chat.usage.total_tokens
    assert told.model == MODEL and told.instructions == "Be brief." and told.store  # type: ignore[attr-defined]


@pytest.mark.parametrize("limit", [3, 400])
def test_an_answer_that_is_cut_short_says_so(client: openai.OpenAI, limit: int) -> None:
    told = client.responses.create(**{**GREEDY, "max_output_tokens": limit}, input=ASK)
    chat = client.chat.completions.create(
        model=MODEL, temperature=0, max_tokens=limit, messages=[{"role": "user", "content": ASK}]
    )
    cut = chat.choices[0].finish_reason == "length"
    (item,) = told.output
    assert told.status == ("incomplete" if cut else "completed")
    assert item.type == "message" and item.status == told.status
    reason = told.incomplete_details and told.incomplete_details.reason
    assert reason == ("max_output_tokens" if cut else None)


def test_a_stream_has_the_official_events_in_order(client: openai.OpenAI) -> None:
    whole = client.responses.create(**GREEDY, input=ASK)
    events: list[Any] = list(client.responses.create(**GREEDY, input=ASK, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    deltas = kinds.count("response.output_text.delta")
    assert deltas > 1 and kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * deltas,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        f"response.{whole.status}",
    ]
    assert "".join(event.delta for event in events[4:-4]) == whole.output_text
    assert events[-4].text == events[-3].part.text == whole.output_text
    assert events[0].response.status == events[1].response.status == "in_progress"
    last = events[-1].response
    assert last.output_text == whole.output_text and last.id == events[0].response.id
    assert last.usage.output_tokens == whole.usage.output_tokens  # type: ignore[union-attr]
    (item,) = last.output
    assert events[-2].item == item and item.id == events[2].item.id == events[4].item_id


def test_the_helper_for_streams_reads_them(client: openai.OpenAI) -> None:
    form: Any = {"format": {"type": "json_schema", "name": "trip", "schema": SCHEMA}}
    wanted = {**GREEDY, "max_output_tokens": 300, "text": form}  # which ends by itself
    with client.responses.stream(**wanted, input=ASK) as stream:
        for _ in stream:
            pass
        last = stream.get_final_response()
    assert last.output_text == client.responses.create(**wanted, input=ASK).output_text


def test_a_stream_names_its_events_and_just_ends(server: LiveServer) -> None:
    text = server.http.post("/v1/responses", json={**GREEDY, "input": ASK, "stream": True}).text
    pieces = [piece for piece in text.split("\n\n") if piece and not piece.startswith(":")]
    for piece in pieces:
        name, data = piece.split("\n")
        assert name == f"event: {json.loads(data.removeprefix('data: '))['type']}"
    assert "[DONE]" not in text


def test_log_probabilities_are_told_where_they_are_asked_for(client: openai.OpenAI) -> None:
    wanted: Any = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    told = client.responses.create(**GREEDY, **wanted, input=ASK)
    (item,) = told.output
    assert item.type == "message" and item.content[0].type == "output_text"
    logprobs = item.content[0].logprobs
    assert logprobs and told.usage and len(logprobs) == told.usage.output_tokens
    assert all(len(one.top_logprobs) == 2 for one in logprobs)
    events: list[Any] = list(client.responses.create(**GREEDY, **wanted, input=ASK, stream=True))
    streamed = [one for e in events if e.type == "response.output_text.delta" for one in e.logprobs]
    assert [one.token for one in streamed] == [one.token for one in logprobs]


def test_an_answer_has_the_form_that_is_asked_for(client: openai.OpenAI) -> None:
    form: Any = {"format": {"type": "json_schema", "name": "trip", "schema": SCHEMA}}
    told = client.responses.create(
        model=MODEL, max_output_tokens=300, input="Where?", text={**form, "verbosity": "medium"}
    )
    jsonschema.validate(json.loads(told.output_text), SCHEMA)
    assert told.text is not None and told.text.format is not None
    assert told.text.format.type == "json_schema" and told.text.format.schema_ == SCHEMA
    whatever: Any = {"format": {"type": "json_object"}}
    cut = client.responses.create(**GREEDY, input="Where?", text=whatever)
    assert cut.output_text.startswith("{")


# -- input ---------------------------------------------------------------------------------------


def test_items_and_text_are_the_same_input(client: openai.OpenAI) -> None:
    part: Any = {"type": "input_text", "text": ASK}
    shapes: list[Any] = [
        ASK,
        [{"role": "user", "content": ASK}],
        [{"type": "message", "role": "user", "content": [part]}],
        [{"id": "msg_1", "type": "message", "status": "completed", "role": "user", "content": ASK}],
    ]
    texts = [client.responses.create(**GREEDY, input=shape).output_text for shape in shapes]
    assert len(set(texts)) == 1
    counts = [client.responses.input_tokens.count(model=MODEL, input=shape) for shape in shapes]
    (count,) = {told.input_tokens for told in counts}
    usage = client.responses.create(**GREEDY, input=ASK).usage
    assert usage is not None and usage.input_tokens == count


@pytest.mark.parametrize("inline", [False, True])
def test_a_file_is_computed_once(client: openai.OpenAI, inline: bool) -> None:
    text = f"{inline} {STORY}"
    if inline:
        data = base64.b64encode(text.encode()).decode()
        file: Any = {"file_data": f"data:text/plain;base64,{data}", "filename": "story.txt"}
    else:
        uploaded = client.files.create(file=("story.txt", text.encode()), purpose="user_data")
        file = {"file_id": uploaded.id}
    content: Any = [{"type": "input_file", **file}, {"type": "input_text", "text": ASK}]
    wanted: Any = [{"role": "user", "content": content}]
    first = client.responses.create(**GREEDY, input=wanted)
    again = client.responses.create(**GREEDY, input=wanted)
    assert first.usage is not None and again.usage is not None
    count = client.responses.input_tokens.count(model=MODEL, input=wanted).input_tokens
    assert count == first.usage.input_tokens > 300
    found = again.usage.input_tokens_details
    assert found.cached_tokens == (count - 1) // 64 * 64
    assert found.cache_write_tokens <= 64 and again.output_text == first.output_text
    items = client.responses.input_items.list(first.id).data
    (item,) = items
    assert item.type == "message" and item.content[0].type == "input_file"
    kept = item.content[0]
    assert kept.file_id and not kept.file_data  # the text is in the file, and nowhere else
    client.files.delete(kept.file_id)
    with pytest.raises(openai.NotFoundError) as caught:
        client.responses.create(**GREEDY, input="And?", previous_response_id=first.id)
    assert caught.value.param == "input"


def test_written_to_the_cache_is_what_was_not_found(client: openai.OpenAI) -> None:
    usages = []
    for question in ("Who came?", "Who left? Nobody did, or so they say."):
        told = client.responses.create(**GREEDY, instructions=f"Listen. {STORY}", input=question)
        assert told.usage is not None
        usages.append(told.usage)
    new, second = usages
    assert new.input_tokens_details.cached_tokens == 0
    assert new.input_tokens_details.cache_write_tokens == new.input_tokens // 64 * 64
    found = second.input_tokens_details
    assert found.cached_tokens >= (new.input_tokens // 64 - 1) * 64 > 0
    assert found.cached_tokens + found.cache_write_tokens == second.input_tokens // 64 * 64


# -- conversations -------------------------------------------------------------------------------


def test_a_response_is_gone_on_from(client: openai.OpenAI) -> None:
    first = client.responses.create(**GREEDY, input=ASK, instructions="Be brief.")
    second = client.responses.create(**GREEDY, input="And why?", previous_response_id=first.id)
    third = client.responses.create(**GREEDY, input="So?", previous_response_id=second.id)
    said: Any = [
        {"role": "user", "content": ASK},
        *first.output,
        {"role": "user", "content": "And why?"},
        {"role": "assistant", "content": second.output_text},
    ]
    spelled = client.responses.create(**GREEDY, input=said[:3])
    assert spelled.output_text == second.output_text  # the first one's instructions were its own
    spelled = client.responses.create(**GREEDY, input=[*said, {"role": "user", "content": "So?"}])
    assert spelled.output_text == third.output_text
    assert third.previous_response_id == second.id
    client.responses.delete(first.id)
    with pytest.raises(openai.BadRequestError, match="goes on from") as caught:
        client.responses.create(**GREEDY, input="?", previous_response_id=third.id)
    assert caught.value.param == "previous_response_id"
    assert caught.value.code == "previous_response_not_found"


def test_what_is_not_stored_is_not_there(client: openai.OpenAI) -> None:
    told = client.responses.create(**GREEDY, input=ASK, store=False)
    assert told.store is False  # type: ignore[attr-defined]
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(told.id)
    with pytest.raises(openai.BadRequestError):
        client.responses.create(**GREEDY, input=ASK, previous_response_id=told.id)


# -- functions -----------------------------------------------------------------------------------


def test_a_function_is_called_and_answers(tools_client: openai.OpenAI) -> None:
    wanted: Any = {
        "model": MODEL,
        "input": "How is the weather?",
        "tools": [WEATHER],
        "tool_choice": {"type": "function", "name": "weather"},
        "max_output_tokens": 300,
        "temperature": 0,
    }
    told = tools_client.responses.create(**wanted)
    (call,) = told.output
    assert call.type == "function_call" and call.name == "weather" and told.status == "completed"
    jsonschema.validate(json.loads(call.arguments), SCHEMA)
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny."}
    more: Any = {"model": MODEL, "tools": [WEATHER], "max_output_tokens": 6, "temperature": 0}
    after = tools_client.responses.create(**more, input=[result], previous_response_id=told.id)
    spelled: Any = [{"role": "user", "content": "How is the weather?"}, call, result]
    again = tools_client.responses.create(**more, input=spelled)
    assert again.output_text == after.output_text and again.usage and after.usage
    assert again.usage.input_tokens == after.usage.input_tokens

    events: list[Any] = list(tools_client.responses.create(**wanted, stream=True))
    kinds = [event.type for event in events]
    deltas = kinds.count("response.function_call_arguments.delta")
    assert deltas > 1 and kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        *["response.function_call_arguments.delta"] * deltas,
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert "".join(event.delta for event in events[3:-3]) == call.arguments
    assert events[-3].arguments == events[-2].item.arguments == call.arguments


# -- refusals ------------------------------------------------------------------------------------

USER = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"role": "nobody", "content": "x"}]}, "input[0].role"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0]",
        ),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]"),
        ({"input": [{"type": "reasoning", "id": "rs_1", "summary": []}]}, "input[0]"),
        (
            {"input": [{"type": "function_call", "call_id": "a", "name": "b", "arguments": "[]"}]},
            "input[0].arguments",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file", "file_url": "x"}]}]},
            "input[0].content[0].file_url",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "file-1"}]}]},
            "input",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file", "file_data": "%"}]}]},
            "input",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "file_search", "vector_store_ids": []}]}, "tools[0].type"),
        ({"tools": [WEATHER]}, "tools"),  # this model's template takes none
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "mcp"}}, "tool_choice.type"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"truncation": "auto"}, "truncation"),
        ({"max_tool_calls": 1}, "max_tool_calls"),
        ({"service_tier": "priority"}, "service_tier"),
        ({"include": ["file_search_call.results"]}, "include[0]"),
        ({"text": {"verbosity": "high"}}, "text.verbosity"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
        ({"stream_options": {}}, "stream_options"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 40_000}, "max_output_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"model": "other"}, "model"),
        ({"max_tokens": 3}, "max_tokens"),
        ({"messages": []}, "messages"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_had_is_refused(
    server: LiveServer, fields: dict[str, Any], param: str, stream: bool
) -> None:
    body = {"input": ASK, "stream": stream, **fields}
    if "stream_options" in fields and stream:
        return
    reply = server.http.post("/v1/responses", json=body)
    error = reply.json()["error"]
    assert reply.status_code in (400, 404) and error["param"] == param, error
    assert error["message"] and error["type"] == "invalid_request_error"


def test_a_schema_without_an_answer_is_named_as_it_was_sent(server: LiveServer) -> None:
    form = {"type": "json_schema", "name": "a", "schema": {"type": "nonsense"}, "strict": True}
    reply = server.http.post("/v1/responses", json={"input": ASK, "text": {"format": form}})
    error = reply.json()["error"]
    assert reply.status_code == 400 and error["param"] == "text.format", error


def test_a_stream_whose_file_fails_ends_with_a_failed_response(server: LiveServer) -> None:
    scan = b"%PDF-1.4\nnothing"
    data = base64.b64encode(scan).decode()
    part = {"type": "input_file", "file_data": data, "filename": "scan.pdf"}
    body = {"input": [{"role": "user", "content": [part]}], "stream": True}
    reply = server.http.post("/v1/responses", json=body)
    if reply.status_code == 400:  # it was read before the answer could begin
        assert "scan.pdf" in reply.json()["error"]["message"]
        return
    last = json.loads(reply.text.rstrip().rsplit("data: ", 1)[1])
    if last["type"] == "error":  # it was read after a ping, before the answer could begin
        assert "scan.pdf" in last["message"] and last["code"] == "file_error"
        return
    assert last["type"] == "response.failed" and last["response"]["status"] == "failed"
    assert last["response"]["error"]["code"] == "invalid_prompt"
    assert "scan.pdf" in last["response"]["error"]["message"]
