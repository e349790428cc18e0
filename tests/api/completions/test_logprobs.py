"""Log-probabilities over the wire, as the `openai` package reads them."""

from typing import Any

import openai
import pytest

from tests.api.live_server import MODEL, LiveServer

HELLO: Any = [{"role": "user", "content": "What is the name of the ship?"}]
CHAT: dict[str, Any] = {"model": MODEL, "messages": HELLO, "temperature": 0.0, "max_tokens": 12}
TEXT: dict[str, Any] = {"model": MODEL, "temperature": 0.0, "max_tokens": 6}
PROMPT = "The name of the ship is 你好 Größe"


def joined(entries: list[Any]) -> bytes:
    return b"".join(bytes(entry.bytes) for entry in entries)


def test_a_chat_tells_of_each_token(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=4)
    (choice,) = answer.choices
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert answer.usage is not None
    entries = choice.logprobs.content
    assert len(entries) == answer.usage.completion_tokens
    for entry in entries:
        assert len(entry.top_logprobs) == 4
        assert entry.logprob == entry.top_logprobs[0].logprob  # greedy
        assert entry.token == entry.top_logprobs[0].token
        assert entry.logprob < 0
    kept = entries if choice.finish_reason == "length" else entries[:-1]
    assert joined(kept).decode(errors="replace") == choice.message.content


def test_a_chat_that_asks_for_no_alternatives_gets_none(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**CHAT, logprobs=True)
    told = answer.choices[0].logprobs
    assert told is not None and told.content
    assert all(entry.top_logprobs == [] for entry in told.content)
    assert client.chat.completions.create(**CHAT).choices[0].logprobs is None


def test_a_streamed_chat_says_the_same(client: openai.OpenAI) -> None:
    wanted = {**CHAT, "logprobs": True, "top_logprobs": 2, "n": 2, "seed": 1, "temperature": 1.0}
    whole = client.chat.completions.create(**wanted)
    entries: dict[int, list[Any]] = {0: [], 1: []}
    for chunk in client.chat.completions.create(**wanted, stream=True):
        (choice,) = chunk.choices
        if choice.logprobs is not None:
            entries[choice.index] += choice.logprobs.content or []
    for choice in whole.choices:
        assert choice.logprobs is not None
        assert entries[choice.index] == choice.logprobs.content


def test_a_completion_tells_of_each_token(client: openai.OpenAI) -> None:
    answer = client.completions.create(**TEXT, prompt=PROMPT, logprobs=3)
    told = answer.choices[0].logprobs
    assert told is not None and told.tokens and told.top_logprobs and told.token_logprobs
    assert told.text_offset is not None and answer.usage is not None
    assert len(told.tokens) == len(told.text_offset) == answer.usage.completion_tokens
    assert told.text_offset[0] == 0
    for token, logprob, top in zip(
        told.tokens, told.token_logprobs, told.top_logprobs, strict=True
    ):
        assert 3 <= len(top) <= 4 and top[token] == logprob == max(top.values())


@pytest.mark.parametrize("as_tokens", [False, True])
def test_an_echo_tells_of_the_prompt_too(
    server: LiveServer, client: openai.OpenAI, as_tokens: bool
) -> None:
    ids = server.tokenizer.encode_completion(PROMPT)
    prompt: Any = ids if as_tokens else PROMPT
    plain = client.completions.create(**TEXT, prompt=PROMPT, logprobs=2)
    answer = client.completions.create(**TEXT, prompt=prompt, logprobs=2, echo=True)
    assert answer.choices[0].text == PROMPT + plain.choices[0].text
    told, alone = answer.choices[0].logprobs, plain.choices[0].logprobs
    assert told is not None and told.tokens and told.token_logprobs and told.top_logprobs
    assert alone is not None and alone.tokens and told.text_offset
    assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
    assert all(one is not None and one < 0 for one in told.token_logprobs[1:])
    assert told.tokens[len(ids) :] == alone.tokens
    assert told.tokens[0] == "<s>" and told.text_offset[:2] == [0, 0]
    assert answer.usage is not None
    assert len(told.tokens) == len(ids) + answer.usage.completion_tokens
    for token, offset in zip(told.tokens[1:], told.text_offset[1:], strict=True):
        if not token.startswith("bytes:") and token not in ("</s>",):
            assert answer.choices[0].text.startswith(token, offset), (token, offset)


def test_a_prompt_alone_is_scored(server: LiveServer, client: openai.OpenAI) -> None:
    """What evaluation harnesses ask for: nothing but the prompt, echoed."""
    wanted: dict[str, Any] = {"model": MODEL, "max_tokens": 0, "logprobs": 1, "echo": True}
    prompts = [server.tokenizer.encode_completion(text) for text in (PROMPT, "In 1932")]
    together = client.completions.create(**wanted, prompt=prompts)
    for ids, choice in zip(prompts, together.choices, strict=True):
        assert choice.logprobs is not None and choice.logprobs.tokens
        assert len(choice.logprobs.tokens) == len(ids)
        alone = client.completions.create(**wanted, prompt=ids)
        assert alone.choices[0].logprobs is not None
        assert alone.choices[0].logprobs.token_logprobs == pytest.approx(
            choice.logprobs.token_logprobs, abs=1e-4
        )


def test_an_echo_without_log_probabilities_is_only_text(client: openai.OpenAI) -> None:
    wanted = {**TEXT, "prompt": [PROMPT, "In 1932"], "n": 2, "temperature": 1.0, "seed": 4}
    plain = client.completions.create(**wanted)
    echoed = client.completions.create(**wanted, echo=True)
    prompts = [PROMPT, PROMPT, "In 1932", "In 1932"]
    assert [choice.text for choice in echoed.choices] == [
        prompt + choice.text for prompt, choice in zip(prompts, plain.choices, strict=True)
    ]
    assert all(choice.logprobs is None for choice in echoed.choices)


def test_a_streamed_echo_says_the_same(client: openai.OpenAI) -> None:
    wanted = {**TEXT, "prompt": [PROMPT, "In 1932"], "n": 2, "logprobs": 2, "echo": True, "seed": 1}
    wanted["temperature"] = 1.0
    whole = client.completions.create(**wanted)
    texts = [""] * 4
    told: list[dict[str, list[Any]]] = [{} for _ in texts]
    for chunk in client.completions.create(**wanted, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        if choice.logprobs is not None:
            for name, values in choice.logprobs.model_dump().items():
                told[choice.index].setdefault(name, []).extend(values)
    assert texts == [choice.text for choice in whole.choices]
    for choice in whole.choices:
        assert choice.logprobs is not None
        expected = choice.logprobs.model_dump()
        assert told[choice.index] == expected


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/chat/completions", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ("/v1/chat/completions", {"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ("/v1/chat/completions", {"logprobs": 5}, "logprobs"),
        ("/v1/chat/completions", {"top_logprobs": 2}, "top_logprobs"),
        ("/v1/completions", {"logprobs": 21}, "logprobs"),
        ("/v1/completions", {"logprobs": -1}, "logprobs"),
        ("/v1/completions", {"logprobs": True}, "logprobs"),
        ("/v1/completions", {"echo": "yes"}, "echo"),
    ],
)
def test_what_is_out_of_range_is_refused(
    server: LiveServer, path: str, fields: dict[str, Any], param: str | None
) -> None:
    body = {"model": MODEL, **({"messages": HELLO} if "chat" in path else {"prompt": "a"})}
    reply = server.http.post(path, json={**body, **fields})
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["param"] == param and error["message"]
