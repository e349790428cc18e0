"""Serves the page at `/`: plain HTML, CSS and JavaScript from this package, nothing from elsewhere.

The page is an ordinary client of the API. Its files say nothing of any tenant, so they are open to
everybody; what they then call wants the API key, which the page asks for. The content security
policy allows it no code, style, picture or connection but the server's own.
"""

import hashlib
from dataclasses import dataclass
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response

from api.http.errors import ApiError

FOLDER = "page"  # of the files' paths, below the page's own
MEDIA_TYPES = {
    "html": "text/html",
    "css": "text/css",
    "js": "text/javascript",
    "svg": "image/svg+xml",
}
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self'",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",
}
HEADERS = {
    "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in POLICY.items()),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # asked for again each time, and sent only where it has changed
}


@dataclass(frozen=True, slots=True)
class StaticFile:
    """One file of the page, with a tag that changes with its content."""

    content: bytes
    media_type: str
    tag: str


def page_files() -> dict[str, StaticFile]:
    """Reads the page's files from the package, by name."""
    found = {}
    for entry in files("api.page").joinpath("static").iterdir():
        media_type = MEDIA_TYPES.get(entry.name.rpartition(".")[2])
        if media_type is not None:
            content = entry.read_bytes()
            tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
            found[entry.name] = StaticFile(content, media_type, tag)
    return found


def page_paths() -> frozenset[str]:
    """Names the paths that need no API key."""
    return frozenset({"/", *(f"/{FOLDER}/{name}" for name in page_files())})


class PageRoutes:
    """The endpoints of the page, whose files are held in memory."""

    def __init__(self) -> None:
        self.files = page_files()

    async def index(self, request: Request) -> Response:
        """Shows a page for browsers: documents, questions, prompts, the cache. Needs no API key."""
        return self._answer(request, self.files["index.html"])

    async def file(self, request: Request) -> Response:
        """Returns a file that the page is made of. Needs no API key."""
        name = request.path_params["name"]
        if name not in self.files:
            raise ApiError(404, f"the page has no file {name!r}; it begins at /")
        return self._answer(request, self.files[name])

    def _answer(self, request: Request, file: StaticFile) -> Response:
        headers = {**HEADERS, "ETag": file.tag}
        if request.headers.get("if-none-match") == file.tag:
            return Response(status_code=304, headers=headers)
        return Response(file.content, media_type=file.media_type, headers=headers)
