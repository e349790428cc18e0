import json
from typing import Any

import pytest

from api.http.bodies import ChatRequest, CompletionRequest, TokenizeRequest
from api.http.errors import ApiError
from api.http.message_bodies import RequestBody
from api.http.read_body import parse
from longctx.errors import InvalidRequest

HELLO = [{"role": "user", "content": "hello"}]


def chat(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate_json(json.dumps({"messages": HELLO, **fields}))


def refused(kind: type[RequestBody], **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(json.dumps(fields).encode(), kind)
    return caught.value


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("functions", [{"name": "f"}]),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "ash", "format": "wav"}),
        ("store", True),
        ("reasoning_effort", "high"),
    ],
)
def test_what_would_change_the_answer_and_is_not_served_is_refused(field: str, value: Any) -> None:
    error = refused(ChatRequest, messages=HELLO, **{field: value})
    assert (error.status, error.param, error.code) == (400, field, "unsupported_value")
    assert error.message == f"{field} is not supported by this server; leave it out"


def test_what_asks_for_nothing_is_accepted() -> None:
    chat(
        tools=[],
        tool_choice="auto",
        response_format={"type": "text"},
        logprobs=False,
        store=False,
        user="me",
        metadata={"a": "b"},
        service_tier="auto",
        parallel_tool_calls=True,
        stop=None,
        seed=None,
    )


def part(content: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [content]}]}


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"messages": HELLO, "temprature": 1}, "temprature", "unknown_parameter"),
        ({"messages": HELLO, "temperature": "hot"}, "temperature", "invalid_value"),
        ({"messages": HELLO, "temperature": "1"}, "temperature", "invalid_value"),
        ({"messages": HELLO, "n": 1.5}, "n", "invalid_value"),
        ({"messages": HELLO, "stop": ["a", 1]}, "stop[1]", "invalid_value"),
        ({"messages": HELLO, "max_tokens": -1}, "max_tokens", "invalid_value"),
        ({"messages": HELLO, "stream_options": {}}, "stream_options", "unsupported_value"),
        ({"messages": HELLO, "top_logprobs": 2}, "top_logprobs", "unsupported_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({}, "messages", "missing_required_parameter"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user"}, {}]}, "messages[1].role", "missing_required_parameter"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "invalid_value"),
        (part({"type": "text"}), "messages[0].content[0].text", "missing_required_parameter"),
        (part({"type": "text", "text": 1}), "messages[0].content[0].text", "invalid_value"),
        (part({"type": "file", "file": {}}), "messages[0].content[0].file", "unsupported_value"),
        (
            part({"type": "file", "file": {"file_id": 1}}),
            *("messages[0].content[0].file.file_id", "invalid_value"),
        ),
        (
            part({"type": "text", "text": "x", "X-Cache-Control": 1}),
            *("messages[0].content[0].X-Cache-Control", "unknown_parameter"),
        ),
        ({"messages": HELLO, "Temperature": 1}, "Temperature", "unknown_parameter"),
        ({"messages": HELLO, "top k": 1}, "top k", "unknown_parameter"),
        ({"messages": HELLO, "logit_bias": {"7": "x"}}, "logit_bias.7", "invalid_value"),
        ({"messages": HELLO, "logit_bias": {"seven": 1}}, "logit_bias.seven", "invalid_value"),
        (
            {"messages": HELLO, "prompt_cache": {"schema": 1}},
            *("prompt_cache.schema", "invalid_value"),
        ),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], param: str | None, code: str) -> None:
    error = refused(ChatRequest, **fields)
    assert (error.status, error.param, error.code) == (400, param, code)


def test_parts_that_are_not_served_are_refused() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:,"}}
    error = refused(ChatRequest, messages=[{"role": "user", "content": [image]}])
    assert "'text', 'file'" in error.message
    empty = {"type": "file", "file": {}}
    error = refused(ChatRequest, messages=[{"role": "user", "content": [empty]}])
    assert error.message.endswith("must have either file_id or file_data")


def test_sampling_parameters_arrive_under_their_names() -> None:
    sampling = chat(
        temperature=0,
        top_p=0.5,
        top_k=3,
        min_p=0.1,
        seed=4,
        n=2,
        stop="a",
        stop_token_ids=[5],
        logit_bias={"7": -100},
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        ignore_eos=True,
    ).sampling(9)
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0, 0.5, 3)
    assert (sampling.min_p, sampling.seed, sampling.n) == (0.1, 4, 2)
    assert (sampling.stop, sampling.stop_token_ids) == (("a",), (5,))
    assert (sampling.logit_bias, sampling.max_tokens, sampling.ignore_eos) == ({7: -100.0}, 9, True)
    assert (sampling.repetition_penalty, sampling.presence_penalty) == (1.1, 0.2)
    assert sampling.frequency_penalty == 0.3


def test_a_value_out_of_range_is_refused_with_its_name() -> None:
    with pytest.raises(InvalidRequest, match=r"top_p=2\.0") as caught:
        chat(top_p=2.0).sampling(1)
    assert caught.value.param == "top_p"


def test_max_completion_tokens_wins_over_its_older_name() -> None:
    assert chat(max_tokens=5).answer_tokens == 5
    assert chat(max_tokens=5, max_completion_tokens=6).answer_tokens == 6
    assert chat().answer_tokens is None


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_a_prompt_is_text_or_ids_one_or_several(prompt: Any, prompts: Any) -> None:
    assert CompletionRequest(prompt=prompt).prompts == prompts


@pytest.mark.parametrize("prompt", [None, 5, [], [[]], [1, "a"], ["a", 1], {"a": 1}])
def test_any_other_prompt_is_refused(prompt: Any) -> None:
    error = refused(CompletionRequest, prompt=prompt)
    assert error.status == 400
    assert error.param is not None and error.param.startswith("prompt")


def test_tokenize_takes_text_or_messages() -> None:
    refused(TokenizeRequest)
    refused(TokenizeRequest, prompt="a", messages=HELLO)
