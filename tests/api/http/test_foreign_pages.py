"""What a page of another web site makes a browser send is refused where it changes anything."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.api.live_server import LiveServer

KNOWN, FOREIGN = "https://notes.example", "https://elsewhere.example"


@pytest.fixture(scope="module")
def running(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    store = tmp_path_factory.mktemp("store")
    with LiveServer(model_folder, store, cors_origin=(KNOWN,)) as server:
        yield server


def posted(server: LiveServer, **headers: str) -> httpx.Response:
    """Upload as a form does, which browsers send without asking first."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    file = {"file": ("a.txt", b"Sent by a page."), "purpose": (None, "user_data")}
    return server.http.post("/v1/files", files=file, headers=named)


def test_a_form_of_another_site_is_refused_and_nothing_is_stored(running: LiveServer) -> None:
    answer = posted(running, Origin=FOREIGN, Sec_Fetch_Site="cross-site")
    assert answer.status_code == 403
    error = answer.json()["error"]
    assert error["code"] == "foreign_origin"
    assert FOREIGN in error["message"] and "--cors-origin" in error["message"]
    assert running.http.get("/v1/files").json()["data"] == []


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Origin": KNOWN, "Sec_Fetch_Site": "cross-site"},
        {"Origin": FOREIGN, "Sec_Fetch_Site": "same-site"},
        {"Sec_Fetch_Site": "same-origin"},
        {"Sec_Fetch_Site": "none"},
    ],
    ids=["a program", "a named site", "another port", "its own page", "the address bar"],
)
def test_others_are_served(running: LiveServer, headers: dict[str, str]) -> None:
    answer = posted(running, **headers)
    assert answer.status_code == 200, answer.text
    assert running.http.delete(f"/v1/files/{answer.json()['id']}").status_code == 200


def test_what_changes_nothing_is_left_to_the_browser(running: LiveServer) -> None:
    headers = {"Origin": FOREIGN, "Sec-Fetch-Site": "cross-site"}
    answer = running.http.get("/v1/models", headers=headers)
    assert answer.status_code == 200
    assert "access-control-allow-origin" not in answer.headers
