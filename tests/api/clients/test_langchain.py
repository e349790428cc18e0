"""LangChain's chat model for OpenAI's interface over the wire: said, streamed, shaped, called."""

from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, Field

from longctx.embedded import model_path
from tests.api.live_server import MODEL, LiveServer
from tests.support.tiny_models import write_model
from tests.support.tiny_tokenizer import write_tokenizer
from tests.support.tool_templates import HERMES_TEMPLATE
from tests.support.waiting import patient

pytest.importorskip(
    "langchain_openai", reason="langchain-openai is not installed; it is in the extra dev"
)
from langchain_core.messages import (
    AIMessage,
    BaseMessageChunk,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

HANDBOOK = b"The north gate is closed at night. The access code of the north gate is 7421.\n"
QUESTION = "What is the access code of the north gate?"
ASK = [SystemMessage("Be brief."), HumanMessage("How is the weather in Trieste?")]


class Forecast(BaseModel):
    """Tells the weather of some days."""

    city: Literal["Trieste", "Rijeka"] = Field(description="where")
    days: Literal[1, 2, 3]


@tool
def weather(city: Literal["Trieste", "Rijeka"]) -> str:
    """Tells the weather."""
    return f"It is sunny in {city}."


@tool
def clock() -> str:
    """Tells the time."""
    return "It is noon."


@pytest.fixture(autouse=True)
def _nothing_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where somebody's environment has it so, LangChain would send questions to a service."""
    for name in ("LANGSMITH_TRACING", "LANGCHAIN_TRACING_V2"):
        monkeypatch.setenv(name, "false")


@pytest.fixture(scope="module")
def finder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server with the embedded model, which finds facts."""
    with LiveServer(model_path(), tmp_path_factory.mktemp("store")) as running:
        yield running


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server with a random model whose template knows tools."""
    folder = tmp_path_factory.mktemp("hermes")
    write_model(folder, num_hidden_layers=1, max_position_embeddings=4096)
    write_tokenizer(folder, chat_template=HERMES_TEMPLATE)
    with LiveServer(folder, tmp_path_factory.mktemp("store")) as running:
        yield running


def chat(server: LiveServer, **more: Any) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=f"{server.url}/v1",
        api_key="none",  # type: ignore[arg-type]
        model=MODEL,
        max_retries=0,
        timeout=patient(),
        **{"temperature": 0, "max_tokens": 300, **more},
    )


def file_question(server: LiveServer) -> list[HumanMessage]:
    with server.openai() as client:
        sent = client.files.create(file=("handbook.txt", HANDBOOK), purpose="user_data")
    file = {"type": "file", "file": {"file_id": sent.id}}
    return [HumanMessage([file, {"type": "text", "text": QUESTION}])]


def joined(chunks: list[Any]) -> Any:
    whole: BaseMessageChunk = chunks[0]
    for chunk in chunks[1:]:
        whole = whole + chunk
    return whole


# -- chats ---------------------------------------------------------------------------------------


def test_a_file_is_asked_about(finder: LiveServer) -> None:
    question = file_question(finder)
    answer = chat(finder).invoke(question)
    assert "7421" in answer.content
    assert answer.response_metadata["finish_reason"] == "stop"
    assert answer.response_metadata["model_name"] == MODEL
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["input_tokens"] > len(QUESTION.split())
    assert answer.usage_metadata["output_tokens"] > 0


def test_a_stream_has_the_same_answer(finder: LiveServer) -> None:
    question = file_question(finder)
    whole = chat(finder).invoke(question)
    chunks = list(chat(finder, stream_usage=True).stream(question))
    assert sum(bool(chunk.content) for chunk in chunks) > 1
    streamed = joined(chunks)
    assert streamed.content == whole.content
    assert streamed.response_metadata["finish_reason"] == "stop"
    counts = ("input_tokens", "output_tokens")
    assert [streamed.usage_metadata[name] for name in counts] == [
        whole.usage_metadata[name]  # type: ignore[index]
        for name in counts
    ]


def test_several_questions_are_asked_at_once(finder: LiveServer) -> None:
    text = HANDBOOK.decode()
    codes = ("7421", "5964")
    answers = chat(finder).batch([f"{text.replace('7421', code)} {QUESTION}" for code in codes])
    assert all(code in answer.content for code, answer in zip(codes, answers, strict=True))


async def _collected(model: ChatOpenAI, question: Any) -> list[Any]:
    return [chunk async for chunk in model.astream(question)]


def test_an_event_loop_is_served_too(finder: LiveServer) -> None:
    question = f"{HANDBOOK.decode()} {QUESTION}"
    chunks = finder.call(_collected(chat(finder), question))
    assert "7421" in joined(chunks).content


def test_responses_are_had_by_the_same_model(finder: LiveServer) -> None:
    model = chat(finder, use_responses_api=True, max_tokens=None)
    whole = model.invoke(f"{HANDBOOK.decode()} {QUESTION}")
    assert "7421" in whole.text
    streamed = joined(list(model.stream(f"{HANDBOOK.decode()} {QUESTION}")))
    assert streamed.text == whole.text


def test_the_sampling_of_a_model_arrives(caller: LiveServer) -> None:
    model = chat(caller, temperature=1.0, seed=7, top_p=0.9, max_tokens=12)
    assert model.invoke(ASK).content == model.invoke(ASK).content
    scored = chat(caller, logprobs=True, top_logprobs=2, max_tokens=4).invoke(ASK)
    entries = scored.response_metadata["logprobs"]["content"]
    assert scored.usage_metadata is not None
    assert len(entries) == scored.usage_metadata["output_tokens"]
    assert all(len(entry["top_logprobs"]) == 2 for entry in entries)
    later = chat(caller, service_tier="flex", max_tokens=2).invoke(ASK)
    assert later.response_metadata["service_tier"] == "flex"


# -- answers in a form ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
@pytest.mark.parametrize("seed", range(2))
def test_an_answer_is_an_object_of_a_class(caller: LiveServer, method: Any, seed: int) -> None:
    model = chat(caller, temperature=1.0, seed=seed)
    found = model.with_structured_output(Forecast, method=method).invoke(ASK)
    assert isinstance(found, Forecast)


def test_a_schema_may_be_given_as_it_is(caller: LiveServer) -> None:
    schema = {
        "title": "forecast",
        "description": "A forecast.",
        "type": "object",
        "properties": {"days": {"enum": [1, 2, 3]}},
        "required": ["days"],
        "additionalProperties": False,
    }
    model = chat(caller, temperature=1.0, seed=1).with_structured_output(schema, include_raw=True)
    found: Any = model.invoke(ASK)
    assert found["parsing_error"] is None and found["parsed"]["days"] in (1, 2, 3)
    assert found["raw"].response_metadata["finish_reason"] == "stop"


# -- tools ---------------------------------------------------------------------------------------


def test_a_tool_is_called_and_answers(caller: LiveServer) -> None:
    model = chat(caller, temperature=1.0, seed=3)
    called = model.bind_tools([weather, clock], tool_choice="weather").invoke(ASK)
    assert isinstance(called, AIMessage) and not called.invalid_tool_calls
    (call,) = called.tool_calls
    assert call["name"] == "weather" and call["args"]["city"] in ("Trieste", "Rijeka")
    answer = weather.invoke(call)
    assert isinstance(answer, ToolMessage)
    offered = chat(caller, max_tokens=6).bind_tools([weather, clock], tool_choice="none")
    before, after = offered.invoke(ASK), offered.invoke([*ASK, called, answer])
    assert before.usage_metadata is not None and after.usage_metadata is not None
    assert after.usage_metadata["input_tokens"] > before.usage_metadata["input_tokens"] + 10


def test_a_streamed_call_is_the_same_call(caller: LiveServer) -> None:
    model = chat(caller, temperature=1.0, seed=4).bind_tools(
        [weather, clock], tool_choice="any", parallel_tool_calls=False
    )
    whole = model.invoke(ASK)
    chunks = list(model.stream(ASK))
    assert sum(bool(chunk.tool_call_chunks) for chunk in chunks) > 2
    streamed = joined(chunks)
    names = [
        [(call["name"], call["args"]) for call in said.tool_calls] for said in (whole, streamed)
    ]
    assert names[0] == names[1] and len(names[0]) == 1


# -- refusals ------------------------------------------------------------------------------------


def test_what_is_refused_raises_what_the_official_client_raises(caller: LiveServer) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(caller, extra_body={"temprature": 1}).invoke(ASK)
    assert (caught.value.param, caught.value.code) == ("temprature", "unknown_parameter")
    assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError, match="gpt-9"):
        chat(caller).bind(model="gpt-9").invoke(ASK)
