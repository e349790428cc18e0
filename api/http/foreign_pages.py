"""Keeps pages of other web sites from making a browser change something here.

A page may post a form to any address that its reader's browser can reach, such as a server without
keys on the reader's own machine. It does not see the answer, but the upload would be stored and the
answer computed. Browsers say where a request comes from (Fetch Metadata,
https://www.w3.org/TR/fetch-metadata/); other clients say nothing, and pass.
"""

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from api.http.errors import ApiError
from api.http.refusals import refusal

CHANGES_NOTHING = frozenset({"GET", "HEAD", "OPTIONS"})


class ForeignPages:
    """ASGI middleware: refuses what a page of a site that is not in `allowed` would change."""

    def __init__(self, app: ASGIApp, *, allowed: tuple[str, ...]) -> None:
        """`allowed`: origins, as `--cors-origin` takes them; `*` allows all."""
        self.app = app
        self.allowed = frozenset(allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._is_foreign(HTTPConnection(scope), scope["method"]):
            return await self.app(scope, receive, send)
        connection = HTTPConnection(scope)
        origin = connection.headers.get("origin", "another web site")
        error = ApiError(
            403,
            f"a page of {origin} may not call this server; start it with --cors-origin ORIGIN if "
            "it shall",
            code="foreign_origin",
        )
        await refusal(connection, error)(scope, receive, send)

    def _is_foreign(self, connection: HTTPConnection, method: str) -> bool:
        headers = connection.headers
        return (
            method not in CHANGES_NOTHING
            and headers.get("sec-fetch-site") == "cross-site"
            and "*" not in self.allowed
            and headers.get("origin") not in self.allowed
        )
