"""What Gemini's API cannot do here is refused in Google's shape, with the field and the cure."""

from typing import Any

import pytest

from tests.api.live_server import MODEL, LiveServer

MODELS = f"/v1beta/models/{MODEL}"
TEXT = [{"parts": [{"text": "Hello"}]}]
FUNCTION = {"name": "clock"}


def part(**fields: Any) -> dict[str, Any]:
    return {"contents": [{"parts": [fields]}]}


def config(**fields: Any) -> dict[str, Any]:
    return {"contents": TEXT, "generationConfig": fields}


def calling(**fields: Any) -> dict[str, Any]:
    return {
        "contents": TEXT,
        "tools": [{"functionDeclarations": [FUNCTION]}],
        "toolConfig": {"functionCallingConfig": fields},
    }


WRONG: list[tuple[Any, str, str]] = [
    ({}, "contents", "required"),
    ({"contents": []}, "contents", ""),
    ({"contents": "Hello"}, "contents", "array"),
    ({"contents": [{"parts": []}]}, "contents[0].parts", ""),
    ({"contents": [{"role": "robot", "parts": [{"text": ""}]}]}, "contents[0].role", ""),
    ({"contents": [{"role": "system", **TEXT[0]}]}, "contents", "systemInstruction"),
    (part(), "contents[0].parts[0]", "exactly one"),
    (part(text="a", functionCall={"name": "b"}), "contents[0].parts[0]", "exactly one"),
    (part(text=5), "contents[0].parts[0].text", ""),
    (part(text="a", thought=True), "contents[0].parts[0].thought", "not supported"),
    (part(functionCall={"name": "clock"}), "contents", "the model's"),
    (part(inlineData={"mimeType": "image/png", "data": "aGk="}), "contents", "documents"),
    (part(inlineData={"mimeType": "text/plain", "data": "!?"}), "contents", "base64"),
    (part(inlineData={"mimeType": "text/plain", "data": ""}), "file", "empty"),
    (part(fileData={"fileUri": "https://youtu.be/abc"}), "contents", "upload"),
    (part(fileData={"fileUri": "gs://bucket/a.pdf"}), "contents", "upload"),
    ({"contents": TEXT, "fish": 1}, "fish", "unknown"),
    ({"contents": TEXT, "systemInstruction": {"parts": []}}, "systemInstruction.parts", ""),
    ({"contents": TEXT, "tools": [{"googleSearch": {}}]}, "tools[0].googleSearch", "leave it out"),
    ({"contents": TEXT, "cachedContent": "cachedContents/none"}, "cachedContent", "expired"),
    ({"contents": TEXT, "store": True}, "store", "not supported"),
    ({"contents": TEXT, "model": "models/other"}, "model", "leave it out"),
    (
        {"contents": TEXT, "safetySettings": [{"category": "A", "threshold": "BLOCK_ONLY_HIGH"}]},
        "safetySettings[0].threshold",
        "not supported",
    ),
    (config(temperature=-1), "generationConfig.temperature", "outside"),
    (config(temperature="hot"), "generationConfig.temperature", "number"),
    (config(topP=2), "generationConfig.topP", "outside"),
    (config(topK=1.5), "generationConfig.topK", ""),
    (config(maxOutputTokens=0), "generationConfig.maxOutputTokens", ""),
    (config(maxOutputTokens=10**6), "generationConfig.maxOutputTokens", "ask for at most"),
    (config(candidateCount=9), "generationConfig.candidateCount", ""),
    (config(stopSequences=[""]), "generationConfig.stopSequences", "empty"),
    (config(responseMimeType="image/png"), "generationConfig.responseMimeType", ""),
    (config(responseSchema={"type": "STRING"}), "generationConfig", "application/json"),
    (config(logprobs=3), "generationConfig", "responseLogprobs"),
    (
        config(thinkingConfig={"thinkingBudget": 100}),
        "generationConfig.thinkingConfig.thinkingBudget",
        "",
    ),
    (config(responseModalities=["IMAGE"]), "generationConfig.responseModalities", ""),
    (
        config(responseMimeType="application/json", responseSchema={"type": "FISH"}),
        "generationConfig.responseSchema",
        "OBJECT",
    ),
    (
        config(responseMimeType="application/json", responseSchema={"$ref": "#"}),
        "generationConfig.responseSchema",
        "JSON Schema",
    ),
    (
        calling(mode="ANY", allowedFunctionNames=["fish"]),
        "toolConfig.functionCallingConfig",
        "fish",
    ),
    (calling(mode="AUTO", allowedFunctionNames=["clock"]), "toolConfig.functionCallingConfig", ""),
    (
        {"contents": TEXT, "tools": [{"functionDeclarations": [FUNCTION, FUNCTION]}]},
        "tools",
        "rename",
    ),
    (
        {
            **config(responseMimeType="application/json"),
            "tools": [{"functionDeclarations": [FUNCTION]}],
        },
        "generationConfig.responseMimeType",
        "excludes tools",
    ),
    (
        {"contents": TEXT, "cachedContent": "a", "systemInstruction": TEXT[0]},
        "cachedContent",
        "systemInstruction",
    ),
]


@pytest.mark.parametrize("method", ["generateContent", "streamGenerateContent"])
@pytest.mark.parametrize(("body", "field", "words"), WRONG)
def test_a_wrong_question_names_the_field(
    server: LiveServer, method: str, body: Any, field: str, words: str
) -> None:
    answer = server.http.post(f"{MODELS}:{method}", json=body)
    error = answer.json()["error"]
    assert answer.status_code == error["code"] < 500
    assert error["status"] in ("INVALID_ARGUMENT", "NOT_FOUND")
    named = [
        violation["field"]
        for detail in error["details"]
        for violation in detail.get("fieldViolations", ())
    ]
    assert named == [field] and words in error["message"]


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b'{"contents": "\xff"}'])
def test_what_is_no_body_is_refused(server: LiveServer, data: bytes) -> None:
    answer = server.http.post(f"{MODELS}:generateContent", content=data)
    assert answer.status_code == 400
    assert answer.json()["error"]["status"] == "INVALID_ARGUMENT"


def test_unknown_names_are_not_found(server: LiveServer) -> None:
    for method, path in (
        ("POST", "/v1beta/models/fish:generateContent"),
        ("GET", "/v1beta/models/fish"),
        ("GET", "/v1beta/files/none"),
        ("DELETE", "/v1beta/files/none"),
        ("GET", "/v1beta/cachedContents/none"),
        ("PATCH", "/v1beta/cachedContents/none"),
        ("DELETE", "/v1beta/cachedContents/none"),
        ("POST", "/upload/v1beta/sessions/none"),
        ("POST", f"{MODELS}:fish"),
        ("GET", "/v1beta/fish"),
    ):
        answer = server.http.request(method, path, json={"contents": TEXT})
        assert answer.status_code == (405 if path.endswith(":fish") else 404), path
        assert answer.json()["error"]["status"] in ("NOT_FOUND", "UNIMPLEMENTED")


@pytest.mark.parametrize("query", ["pageSize=0", "pageSize=x", "pageToken=x", "fish=1"])
@pytest.mark.parametrize("path", ["models", "files", "cachedContents"])
def test_a_wrong_query_is_refused(server: LiveServer, path: str, query: str) -> None:
    answer = server.http.get(f"/v1beta/{path}?{query}")
    assert answer.status_code == 400, answer.text


def test_another_form_of_a_stream_is_refused(server: LiveServer) -> None:
    body = {"contents": TEXT}
    answer = server.http.post(f"{MODELS}:streamGenerateContent?alt=media", json=body)
    assert answer.status_code == 400 and "sse" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "contents"),
        ({"contents": None}, "contents"),
        ({"contents": TEXT, "generateContentRequest": {"contents": TEXT}}, "contents"),
    ],
)
def test_one_thing_is_counted(server: LiveServer, body: Any, field: str) -> None:
    answer = server.http.post(f"{MODELS}:countTokens", json=body)
    assert answer.status_code == 400 and field in answer.json()["error"]["message"]


def test_without_a_place_for_tools_they_are_refused(model_folder: Any, tmp_path: Any) -> None:
    with LiveServer(model_folder, tmp_path) as server:
        body = {"contents": TEXT, "tools": [{"functionDeclarations": [FUNCTION]}]}
        answer = server.http.post(f"{MODELS}:generateContent", json=body)
        assert answer.status_code == 400 and "template" in answer.json()["error"]["message"]
        cached = {"model": MODEL, **body}
        assert server.http.post("/v1beta/cachedContents", json=cached).status_code == 400
