from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.api.live_server import MODEL, LiveServer
from tests.support.tiny_models import write_model
from tests.support.tiny_tokenizer import write_tokenizer

GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0.0, "max_tokens": 6}


def test_text_and_its_token_ids_give_the_same_answer(
    server: LiveServer, client: openai.OpenAI
) -> None:
    text = "The name of the ship is"
    ids = server.tokenizer.encode_completion(text)
    said = [
        client.completions.create(**GREEDY, prompt=prompt).choices[0].text for prompt in (text, ids)
    ]
    assert said[0] == said[1] != ""


def test_several_prompts_are_answered_in_order(client: openai.OpenAI) -> None:
    prompts = ["The harbour", "In 1932", "def answer("]
    alone = [client.completions.create(**GREEDY, prompt=prompt) for prompt in prompts]
    together = client.completions.create(**GREEDY, prompt=prompts)
    assert [choice.text for choice in together.choices] == [one.choices[0].text for one in alone]
    assert together.usage is not None
    assert together.usage.prompt_tokens == sum(
        one.usage.prompt_tokens for one in alone if one.usage is not None
    )


def test_choices_of_several_prompts_are_numbered_on(client: openai.OpenAI) -> None:
    lists = [[5, 6, 7], [8, 9]]
    answer = client.completions.create(model=MODEL, prompt=lists, n=2, max_tokens=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]


def test_a_stream_of_several_prompts_says_the_same(client: openai.OpenAI) -> None:
    prompts = ["The harbour", "In 1932"]
    whole = client.completions.create(**GREEDY, prompt=prompts)
    texts = ["", ""]
    for chunk in client.completions.create(**GREEDY, prompt=prompts, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]


def test_no_tokens_asked_for_reads_the_prompt_only(client: openai.OpenAI) -> None:
    text = "A reader asked what the secret number was. " * 30
    first = client.completions.create(model=MODEL, prompt=text, max_tokens=0)
    assert first.choices[0].text == ""
    second = client.completions.create(model=MODEL, prompt=text, max_tokens=1)
    assert second.usage is not None and second.usage.prompt_tokens_details is not None
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached is not None and cached > second.usage.prompt_tokens - 65


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server whose contexts have 96 tokens."""
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, num_hidden_layers=1, max_position_embeddings=96)
    write_tokenizer(folder)
    with LiveServer(folder, tmp_path_factory.mktemp("store")) as running:
        yield running


@pytest.mark.parametrize(
    ("stated", "prompt_tokens", "answer_tokens"),
    [
        ({}, 8, 16),  # OpenAI's default
        ({}, 93, 3),  # there is no room for more
        ({"max_tokens": 20}, 8, 20),
        ({"max_tokens": None}, 8, 88),
    ],
)
def test_a_completion_of_no_stated_length_has_16_tokens(
    short: LiveServer, stated: dict[str, Any], prompt_tokens: int, answer_tokens: int
) -> None:
    body = {"prompt": [7] * prompt_tokens, "ignore_eos": True, **stated}
    answer = short.http.post("/v1/completions", json=body).json()
    assert answer["usage"]["completion_tokens"] == answer_tokens
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("prompt", [[0, 512], [-1]])
def test_a_token_outside_the_vocabulary_is_refused(client: openai.OpenAI, prompt: Any) -> None:
    with pytest.raises(openai.BadRequestError, match=r"must lie in \[0, 512\)"):
        client.completions.create(model=MODEL, prompt=prompt)


@pytest.mark.parametrize("field", ["suffix", "best_of"])
def test_what_is_not_served_is_refused(client: openai.OpenAI, field: str) -> None:
    value: Any = {"suffix": "end", "best_of": 3}[field]
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="a", **{field: value})
    assert caught.value.param == field
