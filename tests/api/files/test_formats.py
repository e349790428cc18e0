"""Documents as people have them, uploaded to a real server and asked about."""

import base64

import pytest

from tests.api.live_server import LiveServer
from tests.support.made_documents import epub, pdf, word, zipped
from tests.support.waiting import wait_for


def uploaded(server: LiveServer, name: str, content: bytes) -> dict[str, object]:
    answer = server.http.post("/v1/files", files={"file": (name, content)})
    assert answer.status_code == 200, answer.text
    file_id = answer.json()["id"]

    def described() -> dict[str, object] | None:
        body: dict[str, object] = server.http.get(f"/v1/files/{file_id}").json()
        return body if body["longctx"]["state"] in ("ready", "error") else None  # type: ignore[index]

    return wait_for(described)


@pytest.mark.parametrize(
    ("name", "content", "format", "part"),
    [
        ("log.pdf", pdf("The ship left.", "The ship came."), "pdf", "[page 2]\nThe ship came."),
        ("log.docx", word(("Heading 1", "Log"), ("Normal", "It left.")), "docx", "It left."),
        ("log.html", b"<html><h1>Log</h1><p>It left.</p></html>", "html", "It left."),
        ("log.epub", epub("<h1>Log</h1><p>It left.</p>"), "epub", "It left."),
        ("log.zip", zipped(("day/one.txt", b"It left.")), "zip", "# day/one.txt\n\nIt left."),
        ("log.txt", "Größe der Brücke über den Fluß. ".encode("latin-1") * 9, "text", "Größe"),
    ],
)
def test_a_document_is_read_computed_and_asked_about(
    server: LiveServer, name: str, content: bytes, format: str, part: str
) -> None:
    file = uploaded(server, name, content)
    told = file["longctx"]
    assert told["state"] == "ready", told  # type: ignore[index]
    assert told["format"] == format  # type: ignore[index]
    text = server.http.get(f"/v1/files/{file['id']}/text").text
    assert part in text
    assert server.http.get(f"/v1/files/{file['id']}/content").content == content
    for section in server.http.get(f"/v1/files/{file['id']}/sections").json()["data"]:
        assert section["label"] in text[section["offset"] :]
    parts = [{"type": "file", "file": {"file_id": file["id"]}}, {"type": "text", "text": "When?"}]
    body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 4}
    assert server.http.post("/v1/chat/completions", json=body).status_code == 200


def test_what_has_no_text_is_an_error_of_the_file_and_of_who_asks(server: LiveServer) -> None:
    file = uploaded(server, "scan.pdf", pdf("", ""))
    assert file["status"] == "error"
    assert "only pictures" in str(file["status_details"])
    text = server.http.get(f"/v1/files/{file['id']}/text")
    assert text.status_code == 409 and "only pictures" in text.json()["error"]["message"]


def test_a_pdf_inside_a_message_is_read(server: LiveServer) -> None:
    data = base64.b64encode(pdf("The lighthouse is red.")).decode()
    part = {
        "type": "file",
        "file": {"filename": "a.pdf", "file_data": f"data:application/pdf;base64,{data}"},
    }
    body = {"messages": [{"role": "user", "content": [part]}], "max_tokens": 2}
    answer = server.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text


def test_a_deleted_document_leaves_neither_file_nor_text(server: LiveServer) -> None:
    before = {path.name for path in server.documents.iterdir()}
    file = uploaded(server, "log.pdf", pdf("A page that is deleted."))
    assert {path.suffix for path in server.documents.glob(f"{file['id']}.*")} == {
        ".txt", ".read", ".reading", ".tokens",
    }  # fmt: skip
    assert server.http.delete(f"/v1/files/{file['id']}").status_code == 200
    wait_for(lambda: {path.name for path in server.documents.iterdir()} <= before or None)
