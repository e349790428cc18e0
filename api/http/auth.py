"""Finds out who is asking: API keys, and the tenant that each one stands for.

A tenant is HMAC(server secret, key): it salts the block keys, so nobody learns from timing what
another tenant has cached, and it owns files. Without keys there is one tenant, the empty string.
"""

import codecs
import hashlib
import hmac
import re
from pathlib import Path

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from api.config import ServerConfig
from api.http.errors import ApiError
from api.http.refusals import refusal, speaks_gemini
from longctx.errors import LongctxError

OPEN_PATHS = frozenset({"/health"})
# Whoever was given the address of an upload, which cannot be guessed, may go on with it.
OPEN_BEGINNING = "/upload/v1beta/sessions/"
KEY_HEADERS = ("x-api-key", "x-goog-api-key")  # where clients of other APIs send the bare key
SINGLE_TENANT = ""


def read_keys(config: ServerConfig) -> tuple[str, ...]:
    """Returns the accepted keys; none at all means that the server is open to everybody.

    Raises LongctxError for a key file that cannot be read or has no key in it.
    """
    keys = list(config.api_key)
    if config.api_key_file is not None:
        keys += _keys_in(config.api_key_file)
    for number, key in enumerate(keys, 1):
        if not re.fullmatch(r"[!-~]+", key):  # what a client can send as `Authorization: Bearer`
            raise LongctxError(
                f"API key number {number} has a space or a character that is not ASCII; write it "
                "in letters, digits and punctuation of ASCII"
            )
    return tuple(dict.fromkeys(keys))


def _keys_in(file: Path) -> list[str]:
    """Returns the keys of a text file in UTF-8 or UTF-16, one a line. Raises LongctxError."""
    try:
        data = file.read_bytes()
        utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        lines = data.decode("utf-16" if utf16 else "utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LongctxError(f"cannot read the API keys: {error}") from error
    listed = [line.strip() for line in lines if line.strip()]
    if not listed:
        raise LongctxError(f"{file} has no key in it; write one a line")
    return listed


class Authentication:
    """ASGI middleware: refuses requests without a known key and notes the tenant of the others."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: tuple[str, ...],
        secret: bytes,
        open_paths: frozenset[str] = OPEN_PATHS,
    ) -> None:
        """`open_paths`: those that need no key."""
        self.app = app
        self.open_paths = open_paths
        self.tenants = {
            key.encode(): hmac.new(secret, key.encode(), hashlib.sha256).hexdigest() for key in keys
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        tenant: str | None = SINGLE_TENANT
        connection = HTTPConnection(scope)
        path = scope["path"]
        if self.tenants and path not in self.open_paths and not path.startswith(OPEN_BEGINNING):
            tenant = self._tenant(connection)
        if tenant is None:
            error = ApiError(
                401,
                "a valid API key is required: send the header 'Authorization: Bearer KEY' "
                "or 'x-api-key: KEY'; Gemini's clients send 'x-goog-api-key: KEY' or ?key=KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            return await refusal(connection, error)(scope, receive, send)
        scope["longctx.tenant"] = tenant
        await self.app(scope, receive, send)

    def _tenant(self, connection: HTTPConnection) -> str | None:
        """Finds whose key a request carries; where it carries several, of the last known one."""
        scheme, _, bearer = connection.headers.get("authorization", "").partition(" ")
        given = [bearer] if scheme.lower() == "bearer" else []
        given += [connection.headers[name] for name in KEY_HEADERS if name in connection.headers]
        if speaks_gemini(connection):
            given += connection.query_params.getlist("key")
        found = None
        for carried in given:
            for key, tenant in self.tenants.items():  # all: the time says nothing about keys
                if hmac.compare_digest(key, carried.strip().encode()):
                    found = tenant
        return found


def tenant_of(connection: HTTPConnection) -> str:
    """Returns the tenant that `Authentication` found."""
    tenant = connection.scope["longctx.tenant"]
    assert isinstance(tenant, str)
    return tenant
