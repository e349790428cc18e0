"""Answers in the form that was asked for, as the `openai` package asks for them."""

import json
from typing import Any, Literal

import jsonschema
import openai
import pydantic
import pytest

from tests.api.live_server import MODEL, LiveServer

ASK: Any = [{"role": "user", "content": "Describe the ship as JSON."}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "masts": {"type": "integer", "minimum": 1, "maximum": 5},
    },
    "required": ["name", "masts"],
    "additionalProperties": False,
}
CHAT: dict[str, Any] = {"model": MODEL, "messages": ASK, "max_tokens": 200, "seed": 1}


def schema_format(schema: Any, **more: Any) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **more}}


class Ship(pydantic.BaseModel):
    kind: Literal["brig", "sloop"]
    masts: Literal[1, 2, 3]
    at_sea: bool


def test_an_answer_is_valid_for_its_schema(client: openai.OpenAI) -> None:
    for seed in range(4):
        answer = client.chat.completions.create(
            **{**CHAT, "seed": seed}, response_format=schema_format(SCHEMA, strict=True)
        )
        (choice,) = answer.choices
        assert choice.finish_reason == "stop" and choice.message.content is not None
        jsonschema.validate(json.loads(choice.message.content), SCHEMA)


def test_the_client_reads_it_into_a_model(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(**CHAT, response_format=Ship)
    assert isinstance(answer.choices[0].message.parsed, Ship)


def test_a_stream_says_the_same(client: openai.OpenAI) -> None:
    wanted = {**CHAT, "response_format": schema_format(SCHEMA, strict=True), "n": 2}
    whole = client.chat.completions.create(**wanted)
    texts = ["", ""]
    for chunk in client.chat.completions.create(**wanted, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]


def test_any_object_will_do(client: openai.OpenAI) -> None:
    for seed in range(4):
        answer = client.chat.completions.create(
            **{**CHAT, "seed": seed}, response_format={"type": "json_object"}
        )
        (choice,) = answer.choices
        assert choice.message.content is not None and choice.message.content.startswith("{")
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)
        else:
            assert choice.finish_reason == "length"


def test_completions_take_a_form_too(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL,
        prompt="The ship:",
        max_tokens=200,
        extra_body={"response_format": schema_format(SCHEMA)},
    )
    jsonschema.validate(json.loads(answer.choices[0].text), SCHEMA)


def test_log_probabilities_are_the_models_own(client: openai.OpenAI) -> None:
    form = schema_format({"const": "zzzz"})
    answer = client.chat.completions.create(
        **CHAT, response_format=form, logprobs=True, top_logprobs=1
    )
    told = answer.choices[0].logprobs
    assert answer.choices[0].message.content == '"zzzz"' and told is not None and told.content
    assert any(token.logprob < token.top_logprobs[0].logprob for token in told.content)


DEEP: Any = {}
for _ in range(120):
    DEEP = {"items": DEEP}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("form", "param", "says"),
    [
        ({"type": "yaml"}, "response_format", "json_object"),
        ({"type": "json_schema"}, "response_format.json_schema", "required"),
        (schema_format([]), "response_format.json_schema.schema", "an object"),
        (schema_format({}, strict="yes"), "response_format.json_schema.strict", "bool"),
        ({**schema_format({}), "more": 1}, "response_format.more", "unknown"),
        (schema_format(DEEP), "response_format.json_schema.schema", "levels deep"),
        (
            schema_format({"enum": ["x" * 1000] * 300}),
            "response_format.json_schema.schema",
            "the limit is",
        ),
        (schema_format({"type": "nonsense"}), "response_format", "Invalid type"),
        (schema_format({"not": {}}, strict=True), "response_format", "Unimplemented"),
        (schema_format({"$ref": "#"}), "response_format", "cannot be followed"),
        (schema_format({"enum": []}), "response_format", "Unsatisfiable"),
    ],
)
def test_what_cannot_be_followed_is_refused(
    server: LiveServer, form: Any, param: str, says: str, stream: bool
) -> None:
    body = {**CHAT, "response_format": form, "stream": stream}
    reply = server.http.post("/v1/chat/completions", json=body)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, param), error
    assert says in error["message"]


def test_a_name_that_is_none_is_refused(server: LiveServer) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}
    reply = server.http.post("/v1/chat/completions", json={**CHAT, "response_format": form})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "response_format.json_schema.name"
