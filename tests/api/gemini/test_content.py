"""Questions through Google's own client: answers, streams, functions, JSON, counts."""

import io
import json
from typing import Any

import httpx
import jsonschema
import pytest
from reportlab.pdfgen.canvas import Canvas

from tests.api.gemini.google_client import connect
from tests.api.live_server import MODEL, LiveServer

GREEDY = {"temperature": 0, "max_output_tokens": 12}
STORY = b"The lift goes up to the snow, and the road is closed until spring. " * 30
GENERATE = f"/v1beta/models/{MODEL}:generateContent"
STREAM = f"/v1beta/models/{MODEL}:streamGenerateContent"
HELLO = {"contents": [{"parts": [{"text": "Hello"}]}]}
CITY = {"type": "STRING", "enum": ["Trieste", "Rijeka"]}
WEATHER: dict[str, Any] = {
    "name": "weather",
    "description": "Tells the weather",
    "parameters": {"type": "OBJECT", "properties": {"city": CITY}, "required": ["city"]},
}
CLOCK: dict[str, Any] = {"name": "clock"}
AS_JSON_SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Trieste", "Rijeka"]}},
    "required": ["city"],
    "additionalProperties": False,
}


def ask(gemini: Any, contents: Any, **config: Any) -> Any:
    return gemini.models.generate_content(
        model=MODEL, contents=contents, config={**GREEDY, **config}
    )


def posted(server: LiveServer, path: str, body: Any) -> Any:
    answer = server.http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def chat(server: LiveServer, messages: list[dict[str, Any]], **fields: Any) -> Any:
    body = {"messages": messages, "temperature": 0, "max_tokens": 12, **fields}
    return posted(server, "/v1/chat/completions", body)


def test_an_answer_is_that_of_the_same_chat(server: LiveServer, gemini: Any) -> None:
    answer = ask(
        gemini,
        [
            {"role": "user", "parts": [{"text": "Who counts the boats?"}]},
            {"role": "model", "parts": [{"text": "The gulls."}]},
            {"role": "user", "parts": [{"text": "How many"}, {"text": "are there?"}]},
        ],
        system_instruction="Be brief.",
    )
    alike = chat(
        server,
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Who counts the boats?"},
            {"role": "assistant", "content": "The gulls."},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "How many"},
                    {"type": "text", "text": "are there?"},
                ],
            },
        ],
    )
    assert answer.text == alike["choices"][0]["message"]["content"]
    (candidate,) = answer.candidates
    assert candidate.finish_reason.name == "MAX_TOKENS" and candidate.content.role == "model"
    usage = answer.usage_metadata
    assert usage.prompt_token_count == alike["usage"]["prompt_tokens"]
    assert usage.candidates_token_count == alike["usage"]["completion_tokens"] == 12
    assert usage.total_token_count == alike["usage"]["total_tokens"]
    assert answer.model_version == MODEL and answer.response_id


def test_a_stream_says_the_same_piece_by_piece(gemini: Any) -> None:
    whole = ask(gemini, "What do the gulls do?")
    pieces = list(
        gemini.models.generate_content_stream(
            model=MODEL, contents="What do the gulls do?", config=GREEDY
        )
    )
    assert len(pieces) > 3
    assert "".join(piece.text or "" for piece in pieces) == whole.text
    assert [piece.usage_metadata for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].candidates[0].finish_reason.name == "MAX_TOKENS"
    assert pieces[-1].usage_metadata.candidates_token_count == 12


def test_without_alt_a_stream_is_a_json_array(server: LiveServer) -> None:
    body = {**HELLO, "generationConfig": {"temperature": 0, "maxOutputTokens": 8}}
    with server.http.stream("POST", STREAM, json=body) as answer:
        assert answer.headers["content-type"] == "application/json"
        pieces = json.loads(answer.read())
    text = "".join(piece["candidates"][0]["content"]["parts"][0]["text"] for piece in pieces)
    assert text == posted(server, GENERATE, body)["candidates"][0]["content"]["parts"][0]["text"]
    assert "usageMetadata" in pieces[-1]


def test_events_have_nothing_but_data(server: LiveServer) -> None:
    body = {**HELLO, "generationConfig": {"maxOutputTokens": 8}}
    with server.http.stream("POST", f"{STREAM}?alt=sse", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert all(line.startswith('data: {"candidates":') for line in lines)


def test_names_may_be_in_snake_case_and_lists_of_one_may_be_the_one(server: LiveServer) -> None:
    answer = posted(
        server,
        GENERATE,
        {
            "system_instruction": {"parts": {"text": "Be brief."}},
            "contents": {"parts": {"text": "Hello"}},
            "generation_config": {"max_output_tokens": 3, "top_k": 40.0},
        },
    )
    assert answer["usageMetadata"]["candidatesTokenCount"] <= 3


def test_there_may_be_several_candidates(gemini: Any) -> None:
    answer = ask(gemini, "Hello", candidate_count=3, temperature=1.0, seed=5)
    assert [candidate.index or 0 for candidate in answer.candidates] == [0, 1, 2]
    texts = {candidate.content.parts[0].text for candidate in answer.candidates}
    assert len(texts) > 1
    again = ask(gemini, "Hello", candidate_count=3, temperature=1.0, seed=5)
    assert {candidate.content.parts[0].text for candidate in again.candidates} == texts
    assert answer.usage_metadata.candidates_token_count <= 36


def test_a_stop_sequence_ends_an_answer(gemini: Any) -> None:
    text = ask(gemini, "Hello").text
    cut = text[3:6]
    answer = ask(gemini, "Hello", stop_sequences=[cut])
    assert (answer.text or "") == text[: text.index(cut)]
    assert answer.candidates[0].finish_reason.name == "STOP"


def test_log_probabilities_are_those_of_the_chat(server: LiveServer, gemini: Any) -> None:
    answer = ask(gemini, "Hello", response_logprobs=True, logprobs=2)
    told = chat(server, [{"role": "user", "content": "Hello"}], logprobs=True, top_logprobs=2)
    content = told["choices"][0]["logprobs"]["content"]
    result = answer.candidates[0].logprobs_result
    assert [one.token for one in result.chosen_candidates] == [one["token"] for one in content]
    chosen = [one.log_probability for one in result.chosen_candidates]
    assert chosen == pytest.approx([one["logprob"] for one in content])
    assert all(len(one.candidates) == 2 for one in result.top_candidates)
    assert answer.candidates[0].avg_logprobs == pytest.approx(sum(chosen) / len(chosen))


@pytest.mark.parametrize("field", ["response_schema", "response_json_schema"])
def test_json_is_valid_for_its_schema(gemini: Any, field: str) -> None:
    google = {
        "type": "OBJECT",
        "properties": {
            "city": CITY,
            "sure": {"type": "BOOLEAN"},
            "note": {"type": "STRING", "enum": ["a", "b"], "nullable": True},
        },
        "required": ["city", "sure", "note"],
        "propertyOrdering": ["note", "sure", "city"],
    }
    plain = {
        "type": "object",
        "properties": {
            "note": {"enum": ["a", "b", None]},
            "sure": {"type": "boolean"},
            "city": {"enum": ["Trieste", "Rijeka"]},
        },
        "required": ["note", "sure", "city"],
        "additionalProperties": False,
    }
    schema = google if field == "response_schema" else plain
    for seed in range(3):
        answer = ask(
            gemini,
            "Hello",
            **{field: schema},
            response_mime_type="application/json",
            max_output_tokens=300,
            temperature=1,
            seed=seed,
        )
        said = json.loads(answer.text)
        assert list(said) == ["note", "sure", "city"]
        jsonschema.validate(said, plain)


def test_any_json_object_may_be_asked_for(gemini: Any) -> None:
    answer = ask(
        gemini,
        "Hello",
        response_mime_type="application/json",
        max_output_tokens=400,
        temperature=1,
        seed=3,
    )
    if answer.candidates[0].finish_reason.name == "STOP":
        assert isinstance(json.loads(answer.text), dict)
    else:
        assert answer.text.startswith("{")


def functions(*declared: dict[str, Any], **calling: Any) -> dict[str, Any]:
    config = {"function_calling_config": calling} if calling else None
    return {"tools": [{"function_declarations": list(declared)}], "tool_config": config}


@pytest.mark.parametrize("seed", range(3))
def test_a_function_is_called_with_arguments_that_fit(gemini: Any, seed: int) -> None:
    wanted = functions(WEATHER, CLOCK, mode="ANY", allowed_function_names=["weather"])
    answer = ask(gemini, "Weather?", **wanted, temperature=1, seed=seed, max_output_tokens=300)
    (call, *_) = answer.function_calls
    assert call.name == "weather" and call.args["city"] in ("Trieste", "Rijeka") and call.id
    assert answer.candidates[0].finish_reason.name in ("STOP", "MAX_TOKENS")


def test_a_stream_has_the_same_calls(gemini: Any) -> None:
    wanted = {**GREEDY, **functions(WEATHER, mode="ANY"), "max_output_tokens": 300}
    whole = ask(gemini, "Weather?", **wanted)
    calls = [
        (call.name, call.args)
        for piece in gemini.models.generate_content_stream(
            model=MODEL, contents="Weather?", config=wanted
        )
        for call in piece.function_calls or ()
    ]
    assert calls == [(call.name, call.args) for call in whole.function_calls] != []


def test_calls_and_responses_of_a_conversation_are_those_of_a_chat(
    server: LiveServer, gemini: Any
) -> None:
    answer = ask(
        gemini,
        [
            {"role": "user", "parts": [{"text": "Weather?"}]},
            {
                "role": "model",
                "parts": [{"function_call": {"name": "weather", "args": {"city": "Rijeka"}}}],
            },
            {
                "role": "user",
                "parts": [
                    {"function_response": {"name": "weather", "response": {"result": "sun"}}},
                    {"text": "And?"},
                ],
            },
        ],
        **functions(WEATHER),
    )
    function = {"name": "weather", "arguments": '{"city": "Rijeka"}'}
    declared = {
        "name": "weather",
        "description": "Tells the weather",
        "parameters": AS_JSON_SCHEMA,
    }
    alike = chat(
        server,
        [
            {"role": "user", "content": "Weather?"},
            {
                "role": "assistant",
                "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
            },
            {"role": "tool", "tool_call_id": "call_1", "content": '{"result": "sun"}'},
            {"role": "user", "content": "And?"},
        ],
        tools=[{"type": "function", "function": declared}],
    )
    assert answer.usage_metadata.prompt_token_count == alike["usage"]["prompt_tokens"]
    cached = alike["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached >= alike["usage"]["prompt_tokens"] // 64 * 64 - 64  # the same tokens


def test_tokens_are_counted_before_they_are_asked(server: LiveServer, gemini: Any) -> None:
    contents = [
        {"inline_data": {"data": STORY, "mime_type": "text/plain"}},
        {"text": "Where does the lift go?"},
    ]
    counted = gemini.models.count_tokens(model=MODEL, contents={"role": "user", "parts": contents})
    answer = ask(gemini, {"role": "user", "parts": contents})
    assert counted.total_tokens == answer.usage_metadata.prompt_token_count > 500
    whole = {
        **HELLO,
        "systemInstruction": {"parts": [{"text": "Be brief."}]},
        "tools": [{"functionDeclarations": [WEATHER]}],
    }
    told = posted(server, f"/v1beta/models/{MODEL}:countTokens", {"generateContentRequest": whole})
    usage = posted(server, GENERATE, {**whole, "generationConfig": {"maxOutputTokens": 1}})
    assert told["totalTokens"] == usage["usageMetadata"]["promptTokenCount"]


def test_what_was_computed_before_is_told_as_it_is(server: LiveServer, gemini: Any) -> None:
    part = {"inline_data": {"data": STORY[::-1], "mime_type": "text/plain"}}
    counts = []
    for question in ("Where?", "Why is that so?"):
        usage = ask(gemini, {"role": "user", "parts": [part, {"text": question}]}).usage_metadata
        counts.append((usage.prompt_token_count, usage.cached_content_token_count))
    (prompt, _), (_, cached) = counts
    assert cached >= (prompt - 64) // 64 * 64
    assert server.engine_stats().cached_tokens >= cached


def test_a_pdf_inside_a_question_is_read(gemini: Any) -> None:
    pages = io.BytesIO()
    canvas = Canvas(pages)
    for number in range(5):
        canvas.drawString(72, 720, f"Page {number}: the gulls count the boats of the harbour.")
        canvas.showPage()
    canvas.save()
    part = {"inline_data": {"data": pages.getvalue(), "mime_type": "application/pdf"}}
    with_it = ask(gemini, {"role": "user", "parts": [part, {"text": "Who?"}]}).usage_metadata
    alone = ask(gemini, "Who?").usage_metadata
    assert with_it.prompt_token_count > alone.prompt_token_count + 60


def test_the_model_is_listed_under_its_names(gemini: Any) -> None:
    names = [model.name for model in gemini.models.list()]
    assert names == [f"models/{MODEL}", "models/org/second"]
    told = gemini.models.get(model="org/second")
    assert told.input_token_limit == 16_384 and "generateContent" in told.supported_actions
    answer = gemini.models.generate_content(
        model="models/org/second", contents="Hello", config=GREEDY
    )
    assert answer.usage_metadata.candidates_token_count == 12


def test_the_client_works_with_either_version_of_the_api(server: LiveServer) -> None:
    for version in ("v1", "v1beta"):
        client = connect(server, api_version=version)
        assert ask(client, "Hello").usage_metadata.candidates_token_count == 12
    listed = server.http.get("/v1/models").json()  # OpenAI's, which has the same path
    assert listed["object"] == "list"


def test_keys_are_taken_where_google_puts_them(hermes_folder: Any, tmp_path: Any) -> None:
    with LiveServer(hermes_folder, tmp_path, api_key=("alice", "bob")) as server:
        refused = server.http.post(GENERATE, json=HELLO)
        assert refused.status_code == 401
        assert refused.json()["error"]["status"] == "UNAUTHENTICATED"
        wrong = server.http.get("/v1beta/models", headers={"x-goog-api-key": "carol"})
        assert wrong.status_code == 401
        assert server.http.get("/v1beta/models?key=carol").status_code == 401
        assert server.http.get("/v1beta/models?key=alice").status_code == 200
        assert server.http.get("/v1beta/files?key=alice&pageSize=3").json() == {"files": []}
        assert server.http.get("/v1/models?key=alice").status_code == 401  # OpenAI's has no such
        listed = httpx.get(f"{server.url}/v1beta/models", headers={"x-goog-api-key": "bob"})
        assert listed.status_code == 200
        client = connect(server, key="alice")
        assert ask(client, "Hello").usage_metadata.candidates_token_count == 12
