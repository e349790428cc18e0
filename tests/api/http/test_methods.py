"""Every path answers every method: by its route, with what is allowed, or as GET without a body."""

import pytest

from tests.api.live_server import MODEL, LiveServer

OF_A_FILE = "DELETE, GET, HEAD, OPTIONS"


@pytest.mark.parametrize("path", ["/health", "/v1/models", f"/v1/models/{MODEL}", "/metrics"])
def test_head_says_what_get_would_without_the_body(server: LiveServer, path: str) -> None:
    whole, head = server.http.get(path), server.http.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == whole.headers["content-type"]
    assert int(head.headers["content-length"]) > 0


def test_head_of_a_file_tells_its_size(server: LiveServer) -> None:
    text = b"The ship is Meridian.\n" * 100
    form = {"data": {"purpose": "user_data"}, "files": {"file": ("a.txt", text)}}
    file_id = server.http.post("/v1/files", **form).json()["id"]
    head = server.http.head(f"/v1/files/{file_id}/content")
    assert (head.status_code, head.headers["content-length"]) == (200, str(len(text)))
    assert server.http.head(f"/v1/files/{file_id}").status_code == 200
    server.http.delete(f"/v1/files/{file_id}").raise_for_status()
    assert server.http.head(f"/v1/files/{file_id}").status_code == 404


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/health", "GET, HEAD, OPTIONS"),
        ("/v1/files", "GET, HEAD, OPTIONS, POST"),
        ("/v1/files/file-1", OF_A_FILE),
        ("/v1/chat/completions", "OPTIONS, POST"),
        ("/v1/prompt_cache/schemas/any", OF_A_FILE),
        ("/openapi.json", "GET, HEAD, OPTIONS"),
    ],
)
def test_all_methods_of_a_path_are_named(server: LiveServer, path: str, allowed: str) -> None:
    asked = server.http.options(path)
    assert (asked.status_code, asked.headers["allow"], asked.content) == (204, allowed, b"")
    for method in ("PUT", "PATCH", "TRACE", "FROBNICATE"):
        refused = server.http.request(method, path)
        assert (refused.status_code, refused.headers["allow"]) == (405, allowed)
        assert allowed in refused.json()["error"]["message"]
    assert server.http.options("/nowhere").status_code == 404


def test_methods_that_clients_invent_are_one_label_of_the_metrics(server: LiveServer) -> None:
    for number in range(5):
        server.http.request(f"INVENTED{number}", "/health")
    text = server.http.get("/metrics").text
    assert "INVENTED" not in text
    label = 'longctx_http_requests_total{method="other",route="/health",status="405"}'
    (line,) = (line for line in text.splitlines() if line.startswith(label))
    assert float(line.split()[-1]) >= 5
