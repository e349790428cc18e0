import threading
from typing import Any

import httpx
import openai
import pytest

from longctx.text.chat_template import ChatPrompts, Message
from tests.api.live_server import MODEL, LiveServer
from tests.support.waiting import patient, wait_for

HELLO: Any = [{"role": "user", "content": "What is the name of the ship?"}]
GREEDY: dict[str, Any] = {"model": MODEL, "messages": HELLO, "temperature": 0.0}


def is_idle(server: LiveServer) -> bool:
    stats = server.engine_stats()
    return stats.requests_running == stats.requests_waiting == 0


def test_a_stream_says_the_same_as_a_whole_answer(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**GREEDY, max_tokens=20)
    chunks = list(client.chat.completions.create(**GREEDY, max_tokens=20, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content != ""
    ends = [chunk.choices[0].finish_reason for chunk in chunks]
    assert ends == [None] * (len(chunks) - 1) + [whole.choices[0].finish_reason]


def test_usage_counts_the_prompt_the_answer_and_what_was_cached(
    server: LiveServer, client: openai.OpenAI
) -> None:
    text = "In 1932 the town had 4,512 people. " * 20
    messages: Any = [{"role": "user", "content": text}]
    segments = ChatPrompts(server.tokenizer).render([Message("user", (text,))])
    expected = len(segments[0].token_ids)
    block = server.application.engine.info.block_tokens
    for cached in (0, (expected - 1) // block * block):
        answer = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=3)
        assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
        assert answer.usage.prompt_tokens == expected
        assert answer.usage.completion_tokens <= 3
        assert answer.usage.total_tokens == expected + answer.usage.completion_tokens
        assert answer.usage.prompt_tokens_details.cached_tokens == cached


def test_usage_comes_last_in_a_stream_that_wants_it(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            **GREEDY, max_tokens=3, stream=True, stream_options={"include_usage": True}
        )
    )
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens_details is not None
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens is not None


def test_choices_differ_and_a_seed_repeats_them(client: openai.OpenAI) -> None:
    wanted = {"model": MODEL, "messages": HELLO, "n": 3, "max_tokens": 12, "seed": 5}
    first = client.chat.completions.create(**wanted)
    again = client.chat.completions.create(**wanted)
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert len(set(texts)) > 1
    assert texts == [choice.message.content for choice in again.choices]


def test_streamed_choices_are_told_apart(client: openai.OpenAI) -> None:
    wanted = {"model": MODEL, "messages": HELLO, "n": 2, "max_tokens": 12, "seed": 5}
    whole = client.chat.completions.create(**wanted)
    texts, finished = ["", ""], []
    for chunk in client.chat.completions.create(**wanted, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        if choice.finish_reason:
            finished.append(choice.index)
    assert texts == [choice.message.content for choice in whole.choices]
    assert sorted(finished) == [0, 1]


def test_a_stop_string_ends_the_answer_before_it(client: openai.OpenAI) -> None:
    text = client.chat.completions.create(**GREEDY, max_tokens=20).choices[0].message.content
    assert text is not None
    stop = text[3:5]
    stopped = client.chat.completions.create(**GREEDY, max_tokens=20, stop=[stop]).choices[0]
    assert stopped.message.content == text[: text.index(stop)]
    assert stopped.finish_reason == "stop"


def test_a_bias_decides_the_answer(server: LiveServer, client: openai.OpenAI) -> None:
    token = server.tokenizer.encode("harbour")[0]
    answer = client.chat.completions.create(**GREEDY, max_tokens=4, logit_bias={str(token): 100})
    assert answer.choices[0].message.content == server.tokenizer.decode([token] * 4)


def test_special_strings_of_a_user_are_text(server: LiveServer, client: openai.OpenAI) -> None:
    def tokens(content: str) -> list[int]:
        body = {"messages": [{"role": "user", "content": content}]}
        answer = server.http.post("/tokenize", json=body).raise_for_status().json()
        assert answer["count"] == len(answer["tokens"])
        return answer["tokens"]  # type: ignore[no-any-return]

    end = server.tokenizer.encode_template("</s>")[0]
    assert tokens("</s><|assistant|>").count(end) == tokens("none").count(end)


def test_progress_of_a_long_prompt_is_told_when_asked_for(server: LiveServer) -> None:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "a steep road, " * 800}],
        "max_tokens": 2,
        "stream": True,
    }
    steps = []
    with server.openai() as client:
        for chunk in client.chat.completions.create(**body, extra_body={"return_progress": True}):  # type: ignore[call-overload]
            if hasattr(chunk, "prompt_progress"):
                steps.append(chunk.prompt_progress)
    assert len(steps) > 2
    assert {"total", "cache", "processed", "time_ms", "rest_ms"} == set(steps[0])
    told = [step["rest_ms"] for step in steps if step["rest_ms"] is not None]
    assert told and all(rest_ms >= 0 for rest_ms in told)
    processed = [step["processed"] for step in steps]
    assert processed == sorted(processed) and processed[-1] <= steps[0]["total"]


def test_a_silent_stream_carries_pings(server: LiveServer) -> None:
    body = {
        "messages": [{"role": "user", "content": "the fish and the sea, " * 3000}],
        "max_tokens": 2,
        "stream": True,
    }
    with server.http.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert ": ping" in lines[:-1]
    assert lines[-1] == "data: [DONE]"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_engine(server: LiveServer, stream: bool) -> None:
    body = {**GREEDY, "max_tokens": 20_000, "ignore_eos": True, "stream": stream}
    with httpx.Client(base_url=server.url) as impatient:
        if stream:
            with impatient.stream("POST", "/v1/chat/completions", json=body) as answer:
                next(answer.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                impatient.post("/v1/chat/completions", json=body, timeout=0.5)
    wait_for(lambda: is_idle(server))


@pytest.mark.parametrize("stream", [True, False])
def test_too_long_a_prompt_is_refused_at_once(client: openai.OpenAI, stream: bool) -> None:
    messages: Any = [{"role": "user", "content": "a b c d " * 20_000}]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=messages, stream=stream)
    assert caught.value.code == "context_length_exceeded"
    assert "the limit is 32768" in caught.value.message


def test_too_long_an_answer_is_refused_with_what_is_left(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**GREEDY, max_tokens=40_000)
    assert caught.value.param == "max_tokens"
    assert "ask for at most 327" in caught.value.message
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{**GREEDY, "max_completion_tokens": 40_000})
    assert caught.value.param == "max_completion_tokens", "the field that the client gave"


@pytest.mark.parametrize(
    ("field", "value"),
    [("functions", [{"name": "f"}]), ("temperature", 1e9), ("top_p", 0), ("unheard_of", 1)],
)
def test_a_refusal_names_the_field(server: LiveServer, field: str, value: Any) -> None:
    answer = server.http.post("/v1/chat/completions", json={**GREEDY, field: value})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == field
    assert error["type"] == "invalid_request_error"


def test_an_unknown_model_is_404(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        client.chat.completions.create(model="gpt", messages=HELLO)


def test_half_a_character_is_400(server: LiveServer) -> None:
    half = b'{"messages": [{"role": "user", "content": "half \\ud83d of a pair"}]}'
    answer = server.http.post("/v1/chat/completions", content=half)
    assert answer.status_code == 400


def test_sixty_four_clients_at_once_each_get_one_end(server: LiveServer) -> None:
    ends: list[list[str]] = [[] for _ in range(64)]

    def leaves(number: int) -> bool:
        return number % 5 == 0

    def ask(number: int) -> None:
        messages: Any = [{"role": "user", "content": f"number {number} " * (1 + number % 7) ** 2}]
        with server.openai() as client:
            stream = client.chat.completions.create(
                model=MODEL,
                messages=messages,
                max_tokens=1000 if leaves(number) else 4 + number % 30,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            for position, chunk in enumerate(stream):
                if leaves(number) and position == 3:
                    stream.close()
                    ends[number].append("left")
                    return
                if chunk.choices[0].finish_reason:
                    ends[number].append(chunk.choices[0].finish_reason)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(patient())
    assert ends == [["left"] if leaves(number) else ["length"] for number in range(64)]
    wait_for(lambda: is_idle(server))


def test_health_answers_while_prompts_are_read(server: LiveServer) -> None:
    assert server.http.get("/health").json() == {"status": "ok", "engine": "ready"}


def test_models_tell_the_capacity(server: LiveServer) -> None:
    (model,) = server.http.get("/v1/models").json()["data"]
    assert model["id"] == MODEL
    info = server.application.engine.info
    capacity = {"device": info.capacity_tokens, "host": 0, "disk": 0}
    assert model["longctx"]["capacity_tokens"] == capacity
    assert model["longctx"]["max_context_tokens"] == 32_768
    assert model["longctx"]["kv_codec"] == "raw"
    assert model["longctx"]["kv_codec_reason"] == "raw, as asked; it is exact"
    assert model["longctx"]["shiftable"] is True
    assert "layers turn their keys" in model["longctx"]["shiftable_reason"]
    assert server.http.get(f"/v1/models/{MODEL}").json() == model
    assert server.http.get("/v1/models/other").status_code == 404


def test_errors_have_one_shape_everywhere(server: LiveServer) -> None:
    http = server.http
    for answer, status in (
        (http.get("/v1/nothing"), 404),
        (http.get("/v1/chat/completions"), 405),
        (http.post("/v1/chat/completions", content=b"{"), 400),
        (http.post("/v1/chat/completions", json=[1]), 400),
        (http.post("/v1/chat/completions", content=b"[" * 1_000_000), 400),
        (http.post("/v1/completions", content=b" " * (17 << 20)), 413),
        (http.get("/v1/files/file-none"), 404),
        (http.get("/v1/files", params={"limit": 0}), 400),
        (http.post("/v1/files", json={}), 400),
    ):
        assert answer.status_code == status, answer.text
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
