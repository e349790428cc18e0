"""Fields of OpenAI's and vLLM's requests: served, without effect by their nature, or refused."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from api.config import ServerConfig
from api.http.bodies import ChatRequest, CompletionRequest
from tests.api.live_server import MODEL, LiveServer

PAGE = Path(__file__).parents[3] / "docs" / "openai.md"
SITE = "https://pages.example.org"
ASK: Any = [{"role": "user", "content": "What is the name of the ship?"}]
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0.0, "max_tokens": 8}


@pytest.fixture(scope="module")
def named(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    store = tmp_path_factory.mktemp("store")
    with LiveServer(model_folder, store, alias=("gpt-4", "gpt-4o"), cors_origin=(SITE,)) as running:
        yield running


def test_every_parameter_of_the_official_client_is_known() -> None:
    client = openai.OpenAI(api_key="none")
    for call, body in (
        (client.chat.completions.create, ChatRequest),
        (client.completions.create, CompletionRequest),
    ):
        names = {name for name in inspect.signature(call).parameters if name != "timeout"}
        names = {name for name in names if not name.startswith("extra_")}
        assert names <= set(body.model_fields)


@pytest.mark.parametrize("body", [ChatRequest, CompletionRequest])
def test_the_page_says_what_becomes_of_every_field(body: Any) -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert not [name for name in body.model_fields if f"`{name}`" not in page]


# -- the last message ----------------------------------------------------------------------------


def test_a_last_message_is_continued(server: LiveServer, client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**GREEDY, messages=ASK)
    begun = "Her name is "
    ids = server.tokenizer.encode(begun, continues=True)
    messages = [*ASK, {"role": "assistant", "content": begun}]
    rest = client.chat.completions.create(
        **{**GREEDY, "max_tokens": 4},
        messages=messages,
        extra_body={"continue_final_message": True, "add_generation_prompt": False},
    )
    assert whole.usage is not None and rest.usage is not None
    assert rest.usage.prompt_tokens == whole.usage.prompt_tokens + len(ids)
    asked = server.http.post("/tokenize", json={"messages": ASK}).json()["tokens"]
    continued = {"messages": messages, "continue_final_message": True}
    assert server.http.post("/tokenize", json=continued).json()["tokens"] == [*asked, *ids]
    expected = client.completions.create(**{**GREEDY, "max_tokens": 4}, prompt=[*asked, *ids])
    assert rest.choices[0].message.content == expected.choices[0].text


@pytest.mark.parametrize("text", ["", " ", "  a b  ", "ends with a line\n", "</s>"])
def test_what_is_continued_is_taken_as_it_is(server: LiveServer, text: str) -> None:
    asked = server.http.post("/tokenize", json={"messages": ASK}).json()["tokens"]
    body = {
        "messages": [*ASK, {"role": "assistant", "content": text}],
        "continue_final_message": True,
    }
    tokens = server.http.post("/tokenize", json=body).json()["tokens"]
    assert tokens == [*asked, *server.tokenizer.encode(text, continues=True)]


def test_nothing_is_put_after_the_last_message(server: LiveServer) -> None:
    asked = server.http.post("/tokenize", json={"messages": ASK}).json()["tokens"]
    body = {"messages": ASK, "add_generation_prompt": False}
    closed = server.http.post("/tokenize", json=body).json()["tokens"]
    assert closed == asked[:-1]  # the template's <|assistant|>


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"continue_final_message": True, "add_generation_prompt": True}, "excludes"),
        ({"continue_final_message": True}, "this is the user's"),
        ({"continue_final_message": 1}, "continue_final_message"),
        ({"stream_options": {"continuous_usage_stats": True}, "stream": True}, "include_usage"),
        ({"service_tier": "priority"}, "service_tier"),
        ({"store": True}, "store"),
        ({"stop": [f"{number}" for number in range(10_000)]}, "10000 strings, the limit is 64"),
        ({"stop": "x" * 5000}, "5000 characters, the limit is 1024"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
    ],
)
def test_what_cannot_be_had_is_refused(
    server: LiveServer, fields: dict[str, Any], says: str
) -> None:
    reply = server.http.post("/v1/chat/completions", json={"messages": ASK, **fields})
    assert reply.status_code == 400 and says in reply.json()["error"]["message"]


# -- streams ---------------------------------------------------------------------------------------


def test_a_stream_counts_on(client: openai.OpenAI) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    for calls in (
        client.chat.completions.create(**GREEDY, messages=ASK, stream=True, stream_options=options),
        client.completions.create(**GREEDY, prompt="In 1932", stream=True, stream_options=options),
    ):
        usages = [chunk.usage for chunk in calls]
        assert all(usage is not None for usage in usages)
        counts = [usage.completion_tokens for usage in usages if usage is not None]
        assert counts == sorted(counts) and counts[-1] == counts[-2] > 1
        last = usages[-1]
        assert last is not None
        assert {usage.prompt_tokens for usage in usages if usage is not None} == {
            last.prompt_tokens
        }


def test_max_completion_tokens_is_the_limit(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=ASK, max_completion_tokens=3, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None and answer.usage.completion_tokens == 3


def test_content_comes_in_parts_and_one_role_may_speak_twice(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "What is the name"}, {"type": "text", "text": "of the ship?"}]
    messages: Any = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": parts},
        {"role": "user", "content": "And of her captain?"},
    ]
    answer = client.chat.completions.create(**GREEDY, messages=messages)
    assert answer.choices[0].message.content


# -- names, tokens, pages of others --------------------------------------------------------------


def test_a_model_answers_under_each_of_its_names(named: LiveServer) -> None:
    with named.openai() as client:
        assert [model.id for model in client.models.list()] == [MODEL, "gpt-4", "gpt-4o"]
        assert client.models.retrieve("gpt-4").id == "gpt-4"
        answer = client.chat.completions.create(**{**GREEDY, "model": "gpt-4o"}, messages=ASK)
        assert answer.model == MODEL
        with pytest.raises(openai.NotFoundError, match="'gpt-4', 'gpt-4o'"):
            client.models.retrieve("gpt-5")


def test_tokens_and_text_are_each_other(server: LiveServer) -> None:
    text = "The harbour 你好"
    told = server.http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert told["count"] == len(told["tokens"]) == len(told["token_strs"])
    assert told["token_strs"][0] == "<s>"
    bare = server.http.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()
    assert bare["tokens"] == told["tokens"][1:] and bare["token_strs"] is None
    assert bare["max_model_len"] == 32_768
    for tokens, expected in ((bare["tokens"], text), (told["tokens"], f"<s>{text}"), ([], "")):
        reply = server.http.post("/detokenize", json={"model": MODEL, "tokens": tokens})
        assert reply.json() == {"prompt": expected}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {"messages": ASK, "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, None),
        ("/tokenize", {"messages": ASK, "continue_final_message": True}, "continue_final_message"),
        ("/detokenize", {"tokens": [512]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
        ("/detokenize", {}, "tokens"),
    ],
)
def test_wrong_token_requests_are_refused(
    server: LiveServer, path: str, body: dict[str, Any], param: str | None
) -> None:
    reply = server.http.post(path, json=body)
    assert reply.status_code == 400 and reply.json()["error"]["param"] == param


def test_embeddings_are_refused_with_the_reason(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="makes no embeddings") as caught:
        client.embeddings.create(model=MODEL, input="a")
    assert caught.value.code == "unsupported_endpoint"


def test_pages_of_a_listed_site_may_call_the_server_and_others_may_not(named: LiveServer) -> None:
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-a"}
    for site, allowed in ((SITE, SITE), ("https://other.example.org", None)):
        before = named.http.options("/v1/chat/completions", headers={"Origin": site, **asks})
        assert before.headers.get("access-control-allow-origin") == allowed
        assert before.status_code == (200 if allowed else 400)
        found = named.http.get("/v1/models", headers={"Origin": site})
        assert found.headers.get("access-control-allow-origin") == allowed
    assert "allow" in named.http.options("/v1/models").headers  # an ordinary OPTIONS still is one


def test_without_the_option_no_page_of_others_may(server: LiveServer) -> None:
    found = server.http.get("/v1/models", headers={"Origin": SITE})
    assert "access-control-allow-origin" not in found.headers


def test_a_page_may_ask_before_it_has_a_key(model_folder: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"cors_origin": ("*",), "api_key": ("secret",)}
    with LiveServer(model_folder, tmp_path, **settings) as running:
        asks = {"Origin": SITE, "Access-Control-Request-Method": "GET"}
        assert running.http.options("/v1/models", headers=asks).status_code == 200
        refused = running.http.get("/v1/models", headers={"Origin": SITE})
        assert refused.status_code == 401  # which the page can read
        assert refused.headers["access-control-allow-origin"] == "*"
        assert isinstance(refused, httpx.Response)


@pytest.mark.parametrize("origin", ["", "example.org", "https://example.org/", "null"])
def test_what_is_no_origin_is_refused(origin: str) -> None:
    with pytest.raises(ValueError, match="is no origin"):
        ServerConfig(cors_origin=(origin,))
    with pytest.raises(ValueError, match="alias is empty"):
        ServerConfig(alias=("",))
