"""`/v1/bench/niah`: the last result of `longctx bench niah` that was written into the store.

    longctx bench niah --out STORE_DIR/bench

The page draws its heat map from it.
"""

import asyncio
import json
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from api.background.store_dir import StoreDir
from api.http.errors import ApiError

BENCH = "niah"
MOST_BYTES = 4 << 20  # far beyond any grid of lengths and depths


class BenchRoutes:
    """The endpoint of a benchmark's result, which is read anew each time it is asked for."""

    def __init__(self, folder: StoreDir) -> None:
        self.path = folder.bench / f"{BENCH}.json"

    async def niah(self, request: Request) -> Response:
        """Returns the result of `longctx bench niah --out STORE_DIR/bench`; 404 without one."""
        return JSONResponse(await asyncio.to_thread(_read, self.path))


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except FileNotFoundError as error:
        raise ApiError(
            404,
            "there is no result here; `longctx bench niah --out STORE_DIR/bench` writes one",
            code="no_result",
        ) from error
    except OSError as error:
        raise ApiError(404, f"the result cannot be read: {error.strerror}") from error
    try:
        record = json.loads(data)
    except ValueError:  # a bench that still writes, or another file
        record = None
    if not isinstance(record, dict) or record.get("bench") != BENCH:
        raise ApiError(
            404,
            "what lies in the result's place is none; `longctx bench niah --out STORE_DIR/bench` "
            "writes one",
            code="no_result",
        )
    return {"object": "bench", **record}
