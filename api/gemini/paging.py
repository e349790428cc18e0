"""Pages of a list: a token says after which element the next one begins.

What a token names may be deleted meanwhile, so it has the place of the element and not its number.
"""

import base64
import binascii
import json
from collections.abc import Callable, Sequence
from typing import TypeVar

from pydantic import ValidationError
from starlette.requests import Request

from api.gemini.bodies import PageQuery
from api.http.errors import ApiError, invalid_body

Item = TypeVar("Item")
Place = tuple[float, str]  # when it was made, and its name


def page_of(
    request: Request,
    items: Sequence[Item],
    place: Callable[[Item], Place],
    *,
    default: int,
    most: int,
) -> tuple[list[Item], str | None]:
    """Returns the page that a request asks for, the youngest items first, and the token of the next
    one. Raises ApiError for a query that is none."""
    given = {name: value for name, value in request.query_params.items() if name != "key"}
    try:
        query = PageQuery.model_validate(given)
    except ValidationError as error:
        raise invalid_body(error, given) from None
    size = min(query.page_size or default, most)
    left = sorted(items, key=place, reverse=True)
    if query.page_token:
        after = _place(query.page_token)
        left = [item for item in left if place(item) < after]
    page = left[:size]
    return page, _token(place(page[-1])) if len(left) > size else None


def _token(place: Place) -> str:
    return base64.urlsafe_b64encode(json.dumps(place).encode()).decode().rstrip("=")


def _place(token: str) -> Place:
    try:
        moment, name = json.loads(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))
        return float(moment), str(name)
    except (binascii.Error, ValueError, TypeError, RecursionError):
        raise ApiError(
            400,
            "pageToken is none of this server's; leave it out to begin anew",
            param="pageToken",
            code="invalid_value",
        ) from None
