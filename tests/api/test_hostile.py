"""Whatever arrives at the socket, the answer is a refusal that says why, or none; others notice
nothing, and nothing is left behind."""

import contextlib
import json
import random
import socket
import struct
import zipfile
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import httpx
import pytest

from tests.api.live_server import MODEL, LiveServer
from tests.support.made_documents import pdf, word, zipped
from tests.support.waiting import patient, wait_for

ASK = [{"role": "user", "content": "Who keeps the harbour?"}]
CHAT = {"model": MODEL, "messages": ASK, "max_tokens": 1}
LIMIT_MIB = 8  # of uploads


@contextlib.contextmanager
def connected(server: LiveServer) -> Iterator[socket.socket]:
    address = server.http.base_url
    with socket.create_connection((address.host, address.port), patient()) as connection:
        yield connection


FORM = "multipart/form-data; boundary=x"


def head(path: str, *headers: str, method: str = "POST", kind: str = "application/json") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: x", f"Content-Type: {kind}", *headers]
    return "\r\n".join([*lines, "", ""]).encode()


def request(body: Any, path: str = "/v1/chat/completions") -> bytes:
    data = json.dumps(body).encode()
    return head(path, f"Content-Length: {len(data)}") + data


def received(connection: socket.socket, until: bytes = b"\r\n\r\n") -> bytes:
    data = b""
    while until not in data:
        piece = connection.recv(1 << 16)
        if not piece:
            break
        data += piece
    return data


def refused(server: LiveServer, body: Any, *, path: str = "/v1/chat/completions") -> dict[str, Any]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    reply = server.http.post(path, content=content)
    assert 400 <= reply.status_code < 500, (reply.status_code, reply.text)
    error: dict[str, Any] = reply.json()["error"]
    assert error["message"] and error["type"]
    return {**error, "status": reply.status_code}


def idle(server: LiveServer) -> bool:
    stats = server.engine_stats()
    return stats.requests_running == stats.requests_waiting == 0


@pytest.fixture(autouse=True)
def _the_server_goes_on(server: LiveServer) -> Iterator[None]:
    yield
    wait_for(lambda: idle(server))
    answer = server.http.post("/v1/chat/completions", json=CHAT)
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 1


def test_an_over_long_prompt_is_refused_with_both_numbers_and_the_cure(server: LiveServer) -> None:
    before = server.engine_stats().computed_tokens
    text = "many different words " * 9_000
    for body, path in (
        ({**CHAT, "messages": [{"role": "user", "content": text}]}, "/v1/chat/completions"),
        ({"prompt": text, "max_tokens": 1}, "/v1/completions"),
        ({"prompt": [7] * 40_000}, "/v1/completions"),
    ):
        for stream in (False, True):
            error = refused(server, {**body, "stream": stream}, path=path)
            assert error["code"] == "context_length_exceeded"
            assert "32768" in error["message"] and "shorten" in error["message"]
    assert "40000" in error["message"]
    assert server.engine_stats().computed_tokens == before


def test_what_there_is_not_is_named(server: LiveServer) -> None:
    error = refused(server, {**CHAT, "model": "gpt-9"})
    assert (error["status"], error["param"]) == (404, "model") and "gpt-9" in error["message"]
    part = {"type": "file", "file": {"file_id": "file-none"}}
    error = refused(server, {**CHAT, "messages": [{"role": "user", "content": [part]}]})
    assert error["status"] == 404 and "file-none" in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"null",
        b"\xff\xfe{}",
        b"{}{}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "\xed\xa0\x80"}]}',
        b'{"messages": "x"}',
        b'{"messages": [1]}',
        b'{"messages": []}',
        b'{"messages": [{"role": "user", "content": {"a": 1}}]}',
        b'{"messages": [{"role": "king", "content": "x"}]}',
    ],
)
def test_a_body_that_is_none_is_refused(server: LiveServer, body: bytes) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
        refused(server, body, path=path)


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("max_tokens", -1, "max_tokens"),
        ("max_tokens", 10**9, "max_tokens"),
        ("temperature", -0.1, "temperature"),
        ("temperature", "hot", "temperature"),
        ("top_p", 0, "top_p"),
        ("n", 0, "n"),
        ("n", 10**6, "n"),
        ("stop", ["x"] * 10_000, "stop"),
        ("stop", [""], "stop"),
        ("stop", ["x" * 10**6], "stop"),
        ("seed", 2**80, "seed"),
        ("logit_bias", {"x": 1}, "logit_bias.x"),
        ("stream", "yes", "stream"),
        ("no_such_thing", 1, "no_such_thing"),
        ("top_logprobs", 99, "top_logprobs"),
        ("response_format", {"type": "json_schema"}, "response_format.json_schema"),
        ("tools", [{"type": "function", "function": {"name": "\x00"}}], "tools[0].function.name"),
    ],
)
def test_a_wrong_parameter_is_named(server: LiveServer, field: str, value: Any, param: str) -> None:
    error = refused(server, {**CHAT, field: value})
    assert error["param"] is not None and error["param"].split(".")[0] == param.split(".")[0]


@pytest.mark.parametrize(
    "text", ["a\0b", "\x1b[2J\x07", "\u202e\ufeff\U000e0041", "\ufffe", "</s>"]
)
def test_any_character_is_text(server: LiveServer, text: str) -> None:
    body = {**CHAT, "messages": [{"role": "user", "content": text}], "user": text, "stop": text}
    assert server.http.post("/v1/chat/completions", json=body).status_code == 200
    tokens = server.http.post("/tokenize", json={"prompt": text, "add_special_tokens": False})
    back = server.http.post("/detokenize", json={"tokens": tokens.json()["tokens"]})
    assert back.json()["prompt"] == text


def test_a_body_over_the_limit_is_refused_before_it_is_read(server: LiveServer) -> None:
    with connected(server) as connection:
        connection.sendall(head("/v1/chat/completions", "Content-Length: 104857600") + b'{"m')
        answer = received(connection)
        assert answer.startswith(b"HTTP/1.1 413 "), answer
    with connected(server) as connection:
        size = 4 * LIMIT_MIB << 20
        connection.sendall(head("/v1/files", f"Content-Length: {size}", kind=FORM) + b"--x\r\n")
        answer = received(connection)
        assert answer.startswith(b"HTTP/1.1 413 "), answer


@pytest.mark.parametrize("sized", [True, False])
def test_a_hundred_megabytes_of_json_are_refused_to_who_sends_them_whole(
    server: LiveServer, sized: bool
) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * (1 << 20)

    content: Any = b" " * (100 << 20) if sized else pieces()
    reply = server.http.post("/v1/chat/completions", content=content)
    assert reply.status_code == 413 and "/v1/files" in reply.json()["error"]["message"]


def test_who_waits_for_a_refusal_in_the_middle_of_a_body_gets_it(server: LiveServer) -> None:
    with connected(server) as connection:
        connection.sendall(head("/v1/chat/completions", "Transfer-Encoding: chunked"))
        with contextlib.suppress(OSError):
            for _ in range(17):
                connection.sendall(b"100000\r\n" + b" " * (1 << 20) + b"\r\n")
        assert received(connection).startswith(b"HTTP/1.1 413 ")


def test_a_slow_upload_arrives_and_holds_nobody_up(server: LiveServer) -> None:
    text = b"The keeper of the harbour is Ana Ruiz."
    body = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n\r\n'
    body += text + b"\r\n--x--\r\n"
    with connected(server) as connection:
        connection.sendall(head("/v1/files", f"Content-Length: {len(body)}", kind=FORM))
        for place in range(len(body)):
            connection.sendall(body[place : place + 1])
            if place % 60 == 0:
                assert server.http.post("/v1/chat/completions", json=CHAT).status_code == 200
        answer = received(connection)
    assert answer.startswith(b"HTTP/1.1 200 "), answer


def test_who_closes_one_half_is_taken_for_one_who_has_left(server: LiveServer) -> None:
    with connected(server) as connection:
        connection.sendall(request({**CHAT, "max_tokens": 30_000, "ignore_eos": True}))
        connection.shutdown(socket.SHUT_WR)
        assert received(connection) == b""  # while the answer would go on
        wait_for(lambda: idle(server))


BODY = request({**CHAT, "max_tokens": 30_000, "ignore_eos": True, "stream": True})


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("stage", [0, 4, 60, len(BODY) - 40, len(BODY), "head", "events"])
def test_a_client_may_leave_at_any_stage(server: LiveServer, stage: int | str, reset: bool) -> None:
    before = len(server.server.server_state.connections)
    with connected(server) as connection:
        connection.sendall(BODY[:stage] if isinstance(stage, int) else BODY)
        if stage == "head":
            received(connection)
        if stage == "events":
            received(connection, b"content")
        if reset:
            linger = struct.pack("ii", 1, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    wait_for(lambda: idle(server))
    wait_for(lambda: len(server.server.server_state.connections) <= before)


def test_a_client_that_never_reads_holds_nobody_up(server: LiveServer) -> None:
    wanted = {**CHAT, "max_tokens": 400, "ignore_eos": True, "stream": True, "n": 8}
    with connected(server) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(request(wanted))
        wait_for(lambda: server.engine_stats().requests_running > 0)
        assert server.http.post("/v1/chat/completions", json=CHAT).status_code == 200
    wait_for(lambda: idle(server))


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /health HTTP/x\r\nHost: x\r\n\r\n",
        b"GET\r\n\r\n",
        b"\0" * 100,
        b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 30_000 + b"\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        head("/tokenize", "Content-Length: -1"),
        head("/tokenize", "Content-Length: 1", "Content-Length: 2"),
        head("/tokenize", "Transfer-Encoding: chunked") + b"zz\r\n",
        head("/tokenize", "Content-Length: 99999999999999999999999"),
    ],
)
def test_what_is_no_http_is_refused(server: LiveServer, data: bytes) -> None:
    with connected(server) as connection, contextlib.suppress(OSError):
        connection.sendall(data)
        answer = received(connection)
        assert not answer or answer.startswith(b"HTTP/1.1 4"), answer[:100]


@pytest.mark.parametrize(
    "path",
    [
        "/v1/files/../../etc/passwd",
        "/v1/files/%2e%2e%2fx",
        "/v1/files/%00",
        "/v1/models/%ff%fe",
        "//health",
        "/v1/files/" + "a" * 5000,
        "/v1/prompt_cache/prompts/%0d%0aX:%201",
    ],
)
def test_a_path_that_leads_nowhere_is_refused(server: LiveServer, path: str) -> None:
    for method in ("GET", "DELETE", "BREW"):
        with connected(server) as connection:
            connection.sendall(head(path, "Connection: close", method=method))
            answer = received(connection, b"\0")
        assert answer.startswith(b"HTTP/1.1 4"), answer
        assert b"error" in answer and b"X: 1" not in answer.split(b"\r\n\r\n")[0]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("../../etc/passwd", "passwd"),
        ("..\\..\\boot.ini", "boot.ini"),
        ("..", "file"),
        ("a/..", "file"),
        ("", "file"),
        (".", "file"),
        ("a%0d%0ab\x1b[2J\x7f.txt", "a%0d%0ab[2J.txt"),
        ("\u202etxt.exe", "txt.exe"),
        ("Überblick.txt", "Überblick.txt"),
        ("x" * 1000 + ".txt", "x" * 251 + ".txt"),
    ],
)
def test_a_file_name_is_a_name_and_no_path(server: LiveServer, name: str, told: str) -> None:
    before = set(server.documents.iterdir())
    body = b'--x\r\nContent-Disposition: form-data; name="file"; filename="'
    body += name.replace("\\", "\\\\").encode() + b'"\r\n\r\ntext of a file\r\n--x--\r\n'
    headers = {"Content-Type": FORM}
    reply = server.http.post("/v1/files", content=body, headers=headers)
    assert reply.status_code == 200, reply.text
    assert reply.json()["filename"] == told
    content = server.http.get(f"/v1/files/{reply.json()['id']}/content")
    assert content.text == "text of a file"
    assert server.http.delete(f"/v1/files/{reply.json()['id']}").status_code == 200
    assert set(server.documents.iterdir()) <= before


def test_a_form_of_endless_headers_is_refused(server: LiveServer) -> None:
    for field in (b"A: ", b"A"):
        body = b"--x\r\n" + field + b"a" * (4 << 20)
        headers = {"Content-Type": FORM}
        reply = server.http.post("/v1/files", content=body, headers=headers)
        assert reply.status_code == 400, reply.text


def bomb(inner: str, mib: int) -> bytes:
    data = BytesIO()
    with (
        zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open(inner, "w", force_zip64=True) as member,
    ):
        for _ in range(mib):
            member.write(b"0" * (1 << 20))
    return data.getvalue()


PDF = pdf("The first page", "The second page")
FILES = {
    "empty.txt": (b"", "is empty"),
    "space.txt": (b" \n\t", "is empty"),
    "garbage.txt": (random.Random(1).randbytes(5000), ""),
    "picture.txt": (b"\x89PNG\r\n\x1a\n" + bytes(99), "image"),
    "encrypted.pdf": (pdf("Secret", password="x"), "password"),
    "broken.pdf": (PDF[: len(PDF) // 2], ""),
    "hostile.pdf": (b"%PDF-1.7\n1 0 obj<</Type/Pages/Kids[1 0 R]/Count 99999999>>endobj", ""),
    "header.pdf": (b"%PDF-1.7\n", ""),
    "bomb.zip": (bomb("a.txt", 80), "no file with text"),
    "broken.zip": (zipped(("a.txt", b"text"))[:40], ""),
    "broken.docx": (word(("Title", "x"))[:900], ""),
    "outside.zip": (zipped(("../../x.txt", b"text"), ("/etc/y.txt", b"text")), None),
    "nothing.zip": (zipped(), ""),
}


@pytest.mark.slow
def test_a_word_document_of_gigabytes_is_an_error(server: LiveServer) -> None:
    files = {"file": ("bomb.docx", bomb("word/document.xml", 3000))}
    path = f"/v1/files/{server.http.post('/v1/files', files=files).json()['id']}"
    assert wait_for(lambda: _done(server.http.get(path)), 200)["state"] == "error"
    assert server.http.delete(path).status_code == 200


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_none_is_an_error_and_nothing_else(server: LiveServer, name: str) -> None:
    content, says = FILES[name]
    reply = server.http.post("/v1/files", files={"file": (name, content)})
    if reply.status_code == 400:
        assert says is not None and says in reply.json()["error"]["message"]
        return
    assert reply.status_code == 200, reply.text
    path = f"/v1/files/{reply.json()['id']}"
    done = wait_for(lambda: _done(server.http.get(path)))
    if says is None:
        assert done["state"] == "ready"
    else:
        assert done["state"] == "error" and says in done["error"], done
        part = {"type": "file", "file": {"file_id": reply.json()["id"]}}
        error = refused(server, {**CHAT, "messages": [{"role": "user", "content": [part]}]})
        assert error["code"] == "file_error"
    assert server.http.delete(path).status_code == 200


def _done(reply: httpx.Response) -> dict[str, Any] | None:
    told: dict[str, Any] = reply.json()["longctx"]
    return told if told["state"] in ("ready", "error") else None
