"""Whatever number comes from outside, the answer is a value in range or a refusal, never a 500."""

import types
from collections.abc import Iterator
from typing import Any, Union, get_args, get_origin

import pytest

from api.http.bodies import ChatRequest, CompletionRequest, GenerationRequest
from tests.api.live_server import MODEL, LiveServer

HOSTILE = ("1e999", "-1e999", "NaN", str(2**70), str(-(2**70)), str(2**63), "-1", "1e300", "1e-320")


def numeric_fields(body: type[GenerationRequest]) -> Iterator[tuple[str, str]]:
    """(field, JSON with `@` in place of the number) of every number that the body can carry."""
    for name, field in body.model_fields.items():
        kinds = _kinds(field.annotation)
        if kinds & {int, float} and bool not in kinds:
            yield name, "@"
        if list in kinds:
            yield name, "[@]"
        if dict in kinds:
            yield name, '{"7": @}'
            yield name, '{"@": 1}'


def _kinds(annotation: Any) -> set[Any]:
    if get_origin(annotation) in (Union, types.UnionType):
        return {kind for part in get_args(annotation) for kind in _kinds(part)}
    if get_origin(annotation) is list and get_args(annotation) == (int,):
        return {list}
    if get_origin(annotation) is dict and get_args(annotation) == (int, float):
        return {dict}
    return {annotation}


CHAT = '"messages": [{"role": "user", "content": "Hi"}]'
CASES = [
    (path, start, name, value)
    for path, start, body in (
        ("/v1/chat/completions", CHAT, ChatRequest),
        ("/v1/completions", '"prompt": "Hi"', CompletionRequest),
    )
    for name, value in numeric_fields(body)
]
CASES += [("/v1/completions", '"max_tokens": 1', "prompt", "[@]")]


def test_the_cases_cover_every_number_that_was_a_fault() -> None:
    names = {name for _, _, name, _ in CASES}
    assert {"seed", "top_k", "stop_token_ids", "logit_bias", "temperature", "n"} <= names


@pytest.mark.parametrize(("path", "start", "name", "value"), CASES)
def test_a_hostile_number_is_refused_or_harmless(
    server: LiveServer, path: str, start: str, name: str, value: str
) -> None:
    few = "" if "max_tokens" in (name, *start.split('"')) else ', "max_tokens": 1'
    for number in HOSTILE:
        field = f'"{name}": {value.replace("@", number)}'
        content = f'{{"model": "{MODEL}", {start}{few}, {field}}}'
        reply = server.http.post(path, content=content)
        assert reply.status_code in (200, 400), (content, reply.text)
        if reply.status_code == 400:
            error = reply.json()["error"]
            assert error["message"] and (error["param"] or error["code"] == "invalid_json"), content


def test_a_bias_outside_the_vocabulary_is_refused_before_anything_is_computed(
    server: LiveServer,
) -> None:
    before = server.engine_stats().computed_tokens
    body = {"model": MODEL, "prompt": "Hi there", "max_tokens": 1, "logit_bias": {"100000": 1.0}}
    reply = server.http.post("/v1/completions", json=body)
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "logit_bias"
    assert "100000" in reply.json()["error"]["message"]
    assert server.engine_stats().computed_tokens == before
