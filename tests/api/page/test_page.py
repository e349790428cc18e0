"""The page over HTTP: what it may load, who gets it, and the result that its heat map shows."""

import json
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import httpx
import pytest

from api.page.page import page_files
from tests.api.live_server import LiveServer

STATIC = {entry.name: entry for entry in files("api.page").joinpath("static").iterdir()}
TEXTS = {name: entry.read_text(encoding="utf-8") for name, entry in STATIC.items()}


@pytest.fixture(scope="module")
def locked(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server that wants a key."""
    with LiveServer(model_folder, tmp_path_factory.mktemp("store"), api_key=("open",)) as running:
        yield running


def test_every_file_of_the_folder_is_served_under_its_name_and_type(server: LiveServer) -> None:
    assert set(page_files()) == set(STATIC)
    for name, text in TEXTS.items():
        answer = server.http.get(f"/page/{name}")
        assert (answer.status_code, answer.text) == (200, text)
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert server.http.get("/").text == TEXTS["index.html"]
    assert server.http.get("/").headers["content-type"] == "text/html; charset=utf-8"
    script = server.http.get("/page/main.js").headers["content-type"]
    assert script == "text/javascript; charset=utf-8"


def test_the_policy_allows_the_server_alone_and_the_page_needs_no_more(server: LiveServer) -> None:
    policy = server.http.get("/").headers["content-security-policy"].split("; ")
    assert "default-src 'none'" in policy
    sources = {name: value for name, _, value in (part.partition(" ") for part in policy)}
    assert {sources[f"{kind}-src"] for kind in ("script", "style", "img", "connect")} == {"'self'"}
    assert not any("unsafe" in part or "*" in part or ":" in part for part in policy)
    page = TEXTS["index.html"]
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:|<script(?![^>]*\ssrc=)", page)
    for name, text in TEXTS.items():
        elsewhere = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"']*", text))
        assert elsewhere <= {"http://www.w3.org/2000/svg"}, name  # the name of a language
    assert not any(re.search(r"innerHTML|insertAdjacentHTML|\beval\(", t) for t in TEXTS.values())


def test_whatever_a_file_names_is_there_and_every_file_is_named() -> None:
    named = set(re.findall(r'(?:href|src)="page/([\w.]+)"', TEXTS["index.html"]))
    for name, text in TEXTS.items():
        if name.endswith(".js"):
            named |= set(re.findall(r'from "\./([\w.]+)"', text))
    assert named | {"index.html"} == set(STATIC)
    for name, text in TEXTS.items():
        missing = [
            element
            for element in re.findall(r'find\("([\w-]+)"\)', text)
            if f'id="{element}"' not in TEXTS["index.html"]
        ]
        assert not missing, name


def test_a_file_that_has_not_changed_is_not_sent_again(server: LiveServer) -> None:
    tag = server.http.get("/page/page.css").headers["etag"]
    again = server.http.get("/page/page.css", headers={"if-none-match": tag})
    assert (again.status_code, again.content) == (304, b"")
    assert server.http.get("/page/page.css", headers={"if-none-match": '"old"'}).text
    head = server.http.head("/")
    assert (head.status_code, head.content, head.headers["etag"] != tag) == (200, b"", True)


@pytest.mark.parametrize("path", ["/page/secret", "/page/..%2fpage.py", "/page/", "/page"])
def test_other_paths_below_it_are_404(server: LiveServer, path: str) -> None:
    answer = server.http.get(path)
    assert answer.status_code == 404
    assert answer.json()["error"]["message"]


def test_the_page_is_open_and_what_it_calls_wants_the_key(locked: LiveServer) -> None:
    for path in ("/", "/page/main.js", "/health"):
        assert locked.http.get(path).status_code == 200
    for path in ("/v1/files", "/v1/cache", "/v1/bench/niah", "/page/secret", "/docs"):
        assert locked.http.get(path).status_code == 401
    keyed = {"Authorization": "Bearer open"}
    assert locked.http.get("/v1/cache", headers=keyed).status_code == 200


def test_no_page_leaves_neither_page_nor_open_paths(model_folder: Path, tmp_path: Path) -> None:
    with LiveServer(model_folder, tmp_path, page=False, api_key=("open",)) as server:
        keyed = {"Authorization": "Bearer open"}
        for path in ("/", "/page/main.js"):
            assert server.http.get(path).status_code == 401
            assert server.http.get(path, headers=keyed).status_code == 404
        assert "/" not in server.http.get("/openapi.json", headers=keyed).json()["paths"]


def test_the_result_of_a_bench_is_told_where_there_is_one(server: LiveServer) -> None:
    def told() -> httpx.Response:
        return server.http.get("/v1/bench/niah")

    folder = server.config.folder / "bench"
    assert told().status_code == 404
    assert "longctx bench niah --out" in told().json()["error"]["message"]
    folder.mkdir()
    record = {"bench": "niah", "command": "longctx bench niah", "results": []}
    try:
        for wrong in ("", "{", "[]", '{"bench": "document"}', "\0"):
            (folder / "niah.json").write_text(wrong)
            assert (told().status_code, told().json()["error"]["code"]) == (404, "no_result")
        (folder / "niah.json").write_text(json.dumps(record))
        assert told().json() == {"object": "bench", **record}
    finally:
        (folder / "niah.json").unlink()
        folder.rmdir()
