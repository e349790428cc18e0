"""Prompt schemas over HTTP: stored, described, used in conversations, refused with the cure."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from longctx.process.client import EngineClient
from longctx.request import LevelVerdict
from prompt_cache.level import Level
from tests.api.live_server import MODEL, LiveServer
from tests.api.test_restart import engine_process
from tests.support.waiting import wait_for

KEYS = ("alice", "bob")
FISH = "The boats come back with fish in the evening, and the market opens. " * 8
SNOW = "The lift goes up to the snow, and the road is closed until spring. " * 12
LAST = "Whoever has the pass pays half in all of the hotels of the valley. " * 6

PML = f"""<schema name="travel">
  <system>You know the notes of a travel agency.</system>
  The agency is closed on Mondays.
  <module name="plan">
    {FISH}
    The traveler stays for <parameter name="duration" length="24" default="three days"/>.
    <union>
      <module name="harbour">{FISH}</module>
      <module name="mountains">{SNOW}</module>
    </union>
  </module>
  <scaffold>
    <module name="pass">{LAST}</module>
    <module name="hotels">{FISH}</module>
  </scaffold>
</schema>"""


@pytest.fixture(scope="module")
def server(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    store = tmp_path_factory.mktemp("store")
    disk = {"kv_dir": store / "kv", "force_level": True}
    with LiveServer(model_folder, store, cache=disk) as running:
        yield running


@pytest.fixture
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with server.openai() as connected:
        yield connected


def stored(http: httpx.Client, text: str = PML, **options: Any) -> dict[str, Any]:
    """The schema, once its modules are computed."""
    answer = http.post("/v1/prompt_cache/schemas", content=text, **options)
    assert answer.status_code == 200, answer.text
    path = f"/v1/prompt_cache/schemas/{answer.json()['name']}"
    wait_for(lambda: http.get(path, **options).json()["state"] == "ready")
    described: dict[str, Any] = http.get(path, **options).json()
    return described


def ask(client: openai.OpenAI, question: str = "What is closed?", **prompt_cache: Any) -> Any:
    return client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": question}],
        max_tokens=4,
        temperature=0,
        extra_body={"prompt_cache": prompt_cache},
    )


def test_a_schema_says_what_its_modules_are_and_where_they_are_kept(server: LiveServer) -> None:
    described = stored(server.http)
    by_name = {module["name"]: module for module in described["modules"]}
    assert list(by_name) == [
        *("#1", "plan", "harbour", "mountains", "pass", "hotels", "pass+hotels")
    ]
    assert by_name["harbour"]["position"] == by_name["mountains"]["position"]
    assert by_name["plan"]["parameters"] == [{"name": "duration", "length": 24, "required": False}]
    assert by_name["pass+hotels"]["members"] == ["pass", "hotels"]
    for module in by_name.values():
        assert module["bytes"] > 0
        assert (module["tier"], module["durable_tokens"]) == ("device", module["tokens"])
    assert described["tokens"] == sum(module["tokens"] for module in by_name.values())
    listed = server.http.get("/v1/prompt_cache/schemas").json()["data"]
    assert [entry["name"] for entry in listed] == ["travel"]


@pytest.mark.parametrize("level", ["exact", "link:16", "modular"])
def test_a_conversation_begins_with_the_chosen_modules(
    server: LiveServer, client: openai.OpenAI, level: str
) -> None:
    stored(server.http)
    chosen: dict[str, Any] = {"modules": ["harbour", "hotels"], "level": level}
    answer = ask(client, schema="travel", parameters={"duration": "a week"}, **chosen)
    told = answer.prompt_cache
    reason = "it is exact" if level == "exact" else "forced, not measured"
    assert (told["schema"], told["level"], told["level_reason"]) == (
        *("travel", level, f"as asked for; {reason}"),
    )
    counts = (told["borrowed_tokens"], told["linked_tokens"])
    match level:
        case "exact":
            assert counts == (0, 0)
        case "link:16":
            assert counts[0] > 500 and counts[1] > 16
        case "modular":
            assert counts[0] > 500 and counts[1] == 0
            assert answer.longctx["computed_tokens"] < 80
    assert answer.usage.prompt_tokens_details.cached_tokens >= counts[0]


def test_all_levels_see_the_same_text(server: LiveServer, client: openai.OpenAI) -> None:
    stored(server.http)
    counts = {
        ask(client, schema="travel", modules=["mountains", "pass"], level=level).usage.prompt_tokens
        for level in ("exact", "link:4", "modular")
    }
    assert len(counts) == 1


def test_link_of_everything_equals_exact_where_there_is_no_gap(
    server: LiveServer, client: openai.OpenAI
) -> None:
    text = f'<schema name="short"><module name="a">{SNOW}</module></schema>'
    stored(server.http, text)
    texts = {
        ask(client, schema="short", modules=["a"], level=level).choices[0].message.content
        for level in ("exact", "link:999999", "link:16", "modular")
    }
    assert len(texts) == 1  # one module with nothing before it: every level is exact


def test_a_stream_says_the_level_too(server: LiveServer) -> None:
    stored(server.http)
    body = {
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 2,
        "stream": True,
        "prompt_cache": {"schema": "travel", "level": "modular"},
    }
    text = server.http.post("/v1/chat/completions", json=body).text
    assert text.count('"prompt_cache":{"schema":"travel","modules":[],"level":"modular"') == 1


def test_a_file_may_follow_a_schema(server: LiveServer, client: openai.OpenAI) -> None:
    stored(server.http)
    file = client.files.create(file=("a.txt", SNOW.encode()), purpose="user_data")
    part: Any = {"type": "file", "file": {"file_id": file.id}}
    answer: Any = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": [part, {"type": "text", "text": "Well?"}]}],
        max_tokens=2,
        extra_body={"prompt_cache": {"schema": "travel", "modules": ["pass"], "level": "modular"}},
    )
    assert answer.prompt_cache["borrowed_tokens"] > 100
    assert "differs from the one" in answer.longctx["document_prefix"][0]["computed_again"]


BAD_CHOICES: dict[str, tuple[dict[str, Any], int, str | None, str]] = {
    "no such schema": ({"schema": "x"}, 404, "prompt_cache.schema", "there is no schema 'x'"),
    "no such module": (
        {"schema": "travel", "modules": ["harbor"]},
        *(400, "prompt_cache.modules", 'no module "harbor"; did you mean "harbour"?'),
    ),
    "two of a union": (
        {"schema": "travel", "modules": ["harbour", "mountains"]},
        *(400, "prompt_cache.modules", "members of one union"),
    ),
    "too long": (
        {"schema": "travel", "modules": ["plan"], "parameters": {"duration": "a long time " * 9}},
        *(400, "prompt_cache.parameters", "its place in the schema is 24"),
    ),
    "unused": (
        {"schema": "travel", "parameters": {"duration": "a day"}},
        *(400, "prompt_cache.parameters", "which is not among the modules"),
    ),
    "no level": (
        {"schema": "travel", "level": "fast"},
        *(400, "prompt_cache.level", "choose exact, modular, or link:K"),
    ),
    "a level of nothing": (
        {"schema": "travel", "level": "link:0"},
        *(400, "prompt_cache.level", "choose exact, modular, or link:K"),
    ),
    "neither": ({}, 400, "prompt_cache", "must have either prompt or schema"),
    "an unknown field": (
        {"schema": "travel", "module": "x"},
        *(400, "prompt_cache.module", "unknown parameter"),
    ),
    "modules of a prompt": (
        {"prompt": "p", "modules": ["x"]},
        *(400, "prompt_cache", "has modules, which are a schema's"),
    ),
}


@pytest.mark.parametrize("case", BAD_CHOICES)
def test_a_wrong_choice_is_refused_in_openais_shape(server: LiveServer, case: str) -> None:
    stored(server.http)
    choice, status, param, words = BAD_CHOICES[case]
    body = {"messages": [{"role": "user", "content": "Hello"}], "prompt_cache": choice}
    answer = server.http.post("/v1/chat/completions", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param)
    assert words in error["message"] and error["type"] == "invalid_request_error"


def test_a_system_message_has_no_place_before_a_schema(server: LiveServer) -> None:
    stored(server.http)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    body = {"messages": messages, "prompt_cache": {"schema": "travel"}}
    answer = server.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert "put that text into the schema, as <system>" in answer.json()["error"]["message"]


BAD_SCHEMAS = {
    "": "the body is empty; send the schema itself",
    "<schema": "line 1, column 1: unclosed token",
    '<schema name="s"><module name="a">x</module><module name="a">y</module></schema>': (
        'line 1, module "a": line 1 has a module of that name'
    ),
    '{"name": "s"}': "it is empty",
    f'<schema name="s">{"word " * 40_000}</schema>': "the limit is ",
}


@pytest.mark.parametrize("text", BAD_SCHEMAS, ids=range(len(BAD_SCHEMAS)))
def test_a_bad_schema_is_refused_with_its_place_and_the_cure(server: LiveServer, text: str) -> None:
    answer = server.http.post("/v1/prompt_cache/schemas", content=text)
    assert answer.status_code == 400, answer.text
    assert BAD_SCHEMAS[text] in answer.json()["error"]["message"]
    assert server.http.post("/v1/prompt_cache/schemas", content=b"\xff").status_code == 400


def test_a_schema_is_replaced_and_deleted(server: LiveServer, client: openai.OpenAI) -> None:
    one = stored(
        server.http, f'{{"name": "mine", "content": [{{"module": "a", "content": "{FISH}"}}]}}'
    )
    again = stored(server.http, f'<schema name="mine"><module name="b">{FISH}</module></schema>')
    assert [module["name"] for module in one["modules"]] == ["#1", "a"]
    assert [module["name"] for module in again["modules"]] == ["#1", "b"]
    before = server.engine_stats().computed_tokens
    more = f'<module name="b">{FISH}</module><module name="c">Fresh.</module>'
    stored(server.http, f'<schema name="mine">{more}</schema>')
    computed = server.engine_stats().computed_tokens - before
    assert computed < 100  # what stands as it stood is not computed again
    answer = ask(client, schema="mine", modules=["b"], level="modular")
    assert answer.prompt_cache["borrowed_tokens"] > 100
    path = "/v1/prompt_cache/schemas/mine"
    assert server.http.delete(path).json()["deleted"] is True
    for answer in (server.http.get(path), server.http.delete(path)):
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "schema_not_found"


def test_schemas_survive_the_engine_and_the_server_and_are_a_tenants_own(
    model_folder: Path, tmp_path: Path
) -> None:
    alice, bob = ({"Authorization": f"Bearer {key}"} for key in KEYS)
    disk = {"kv_dir": tmp_path / "kv", "force_level": True}
    with LiveServer(model_folder, tmp_path, api_key=KEYS, cache=disk) as server:
        stored(server.http, headers=alice)
        path = "/v1/prompt_cache/schemas/travel"
        assert server.http.get(path, headers=bob).status_code == 404
        assert server.http.get("/v1/prompt_cache/schemas", headers=bob).json()["data"] == []
        body = {
            "messages": [{"role": "user", "content": "Hello"}],
            "prompt_cache": {"schema": "travel", "modules": ["pass"], "level": "modular"},
            "max_tokens": 2,
        }
        refused = server.http.post("/v1/chat/completions", json=body, headers=bob)
        assert refused.status_code == 404

        os.kill(engine_process(server), signal.SIGKILL)
        wait_for(lambda: server.application.engine.state == "restarting")
        wait_for(lambda: server.http.get(path, headers=alice).json().get("state") == "ready")
        answer = server.http.post("/v1/chat/completions", json=body, headers=alice).json()
        assert answer["prompt_cache"]["borrowed_tokens"] > 100

    with LiveServer(model_folder, tmp_path, api_key=KEYS, cache=disk) as server:
        wait_for(lambda: server.http.get(path, headers=alice).json()["state"] == "ready")
        modules = server.http.get(path, headers=alice).json()["modules"]
        assert all(module["durable_tokens"] == module["tokens"] for module in modules)
        assert server.engine_stats().computed_tokens == 0  # all of it was on the disk
        answer = server.http.post("/v1/chat/completions", json=body, headers=alice).json()
        assert answer["prompt_cache"]["borrowed_tokens"] > 100
        assert answer["longctx"]["computed_tokens"] < 80
        assert server.http.get(path, headers=bob).status_code == 404


def test_a_level_that_costs_the_model_too_much_is_refused(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate itself is tested with the engine; here it is asked once for each level."""
    asked: list[Level] = []

    async def judge(_client: EngineClient, level: Level) -> LevelVerdict:
        asked.append(level)
        fits = level.link_tokens != 0
        return LevelVerdict(level=level.name, passed=fits, reason="it was measured")

    monkeypatch.setattr(EngineClient, "judge_level", judge)
    with (
        LiveServer(model_folder, tmp_path, prompt_cache_level="modular") as server,
        server.openai() as client,
    ):
        stored(server.http)
        told = ask(client, schema="travel", modules=["pass"]).prompt_cache
        assert (told["level"], told["level_reason"]) == (
            "exact",
            "the server's default, modular, is not used: it was measured",
        )
        told = ask(client, schema="travel", modules=["pass"], level="link:16").prompt_cache
        assert told["level_reason"] == "as asked for; it was measured"
        for _ in range(2):
            with pytest.raises(openai.BadRequestError, match="level modular is refused") as refused:
                ask(client, schema="travel", modules=["pass"], level="modular")
            assert (refused.value.param, refused.value.code) == (
                *("prompt_cache.level", "level_refused"),
            )
    assert asked == [Level(0), Level(16)]
