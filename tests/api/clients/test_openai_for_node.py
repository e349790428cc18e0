"""OpenAI's client for Node, in a program of its own, against a real server.

The package is looked for in the folder that LONGCTX_NODE_MODULES names, or else where
`make node-client` puts it; the tests are skipped where it, or Node, is absent.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from longctx.embedded import model_path
from tests.api.live_server import MODEL, LiveServer
from tests.support.waiting import patient

PROGRAM = Path(__file__).with_name("openai_client.mjs")
ROOT = Path(__file__).parents[3]
OLDEST_NODE = 20
HANDBOOK = "The north gate is closed at night. The access code of the north gate is 7421.\n"

Told = dict[str, Any]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program in a folder of its own, beside a link to what it imports."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    version = subprocess.run(["node", "--version"], capture_output=True, text=True).stdout.strip()
    if int(version.removeprefix("v").partition(".")[0]) < OLDEST_NODE:
        pytest.skip(f"node is {version}; the package wants {OLDEST_NODE}")
    named = os.environ.get("LONGCTX_NODE_MODULES")
    modules = Path(named) if named else ROOT / "out" / "npm" / "node_modules"
    if not (modules / "openai" / "package.json").is_file():
        pytest.skip(f"the npm package openai is not in {modules}; make node-client installs it")
    folder = tmp_path_factory.mktemp("program")
    (folder / "node_modules").symlink_to(modules.resolve())
    return Path(shutil.copy(PROGRAM, folder))


@pytest.fixture(scope="module")
def server(program: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server with the embedded model, which finds facts."""
    with LiveServer(model_path(), tmp_path_factory.mktemp("store")) as running:
        yield running


@pytest.fixture
def run(program: Path, server: LiveServer) -> Callable[[str], Told]:
    def task(name: str) -> Told:
        ran = subprocess.run(
            ["node", str(program), f"{server.url}/v1", MODEL, name],
            capture_output=True,
            text=True,
            timeout=patient(),
        )
        assert ran.returncode == 0, ran.stderr
        told: Told = json.loads(ran.stdout)
        return told

    return task


def test_a_chat_is_answered(run: Callable[[str], Told]) -> None:
    told = run("chat")
    assert "7421" in told["content"] and told["finish_reason"] == "stop"
    assert told["model"] == MODEL
    counts = told["usage"]
    assert counts["total_tokens"] == counts["prompt_tokens"] + counts["completion_tokens"]


def test_a_stream_comes_in_pieces(run: Callable[[str], Told]) -> None:
    told = run("stream")
    assert len(told["pieces"]) > 1 and "7421" in "".join(told["pieces"])
    assert told["helped"] == "".join(told["pieces"])
    assert told["finish_reason"] == "stop" and told["usage"]["completion_tokens"] > 1


def test_a_stream_may_be_left(run: Callable[[str], Told]) -> None:
    assert "7421" in run("left")["content"]


def test_a_file_is_uploaded_asked_about_and_deleted(run: Callable[[str], Told]) -> None:
    told = run("file")
    file = told["file"]
    assert (file["object"], file["filename"], file["purpose"]) == (
        "file",
        "handbook.txt",
        "user_data",
    )
    assert file["bytes"] == len(HANDBOOK) and file["id"] in told["listed"]
    assert told["text"] == HANDBOOK
    assert "7421" in told["answer"] and "7421" in told["response"]
    assert told["events"][0] == "response.created"
    assert told["events"][-1] == "response.completed"
    assert "response.output_text.delta" in told["events"]
    assert told["deletion"]["deleted"] is True
    assert (told["gone"]["kind"], told["gone"]["status"]) == ("NotFoundError", 404)


def test_an_answer_has_the_form_that_was_asked_for(run: Callable[[str], Told]) -> None:
    told = run("shape")
    assert set(told) == {"gate", "open"}
    assert told["gate"] in ("north", "south") and isinstance(told["open"], bool)


def test_what_is_wrong_is_named_by_the_error(run: Callable[[str], Told]) -> None:
    told = run("wrong")
    for name, param, code in (
        ("unknown", "temprature", "unknown_parameter"),
        ("kind", "temperature", "invalid_value"),
        ("stream", "top_p", "invalid_value"),
    ):
        error = told[name]
        assert (error["kind"], error["status"]) == ("BadRequestError", 400)
        assert (error["type"], error["param"], error["code"]) == (
            "invalid_request_error",
            param,
            code,
        )
        assert param in error["message"]
    assert told["model"]["kind"] == "NotFoundError"
    assert (told["model"]["param"], told["model"]["code"]) == ("model", "model_not_found")
