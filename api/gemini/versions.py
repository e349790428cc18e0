"""Sends the newest clients of Gemini's API, which call its version v1, to the same routes."""

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

VERSIONS = {"/v1/": "/v1beta/", "/upload/v1/": "/upload/v1beta/"}
HEADERS = ("x-goog-api-key", "x-goog-api-client")  # tell Google's clients from OpenAI's


class GeminiVersions:
    """ASGI middleware: reads v1 as v1beta in the path of what Google's clients send.

    Under /v1 there are OpenAI's routes, some of them of the same name. It comes before all that
    looks at a path.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = HTTPConnection(scope).headers
            for version, served in VERSIONS.items():
                path: str = scope["path"]
                if path.startswith(version) and any(name in headers for name in HEADERS):
                    scope = {**scope, "path": served + path.removeprefix(version)}
                    break
        await self.app(scope, receive, send)
