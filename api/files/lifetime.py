"""How long a file lives, as it is told in the form of its upload."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from api.http.errors import ApiError, invalid_body
from api.http.message_bodies import RequestBody

LEAST_SECONDS = 3600
MOST_SECONDS = 2_592_000
Seconds = Annotated[int, Field(ge=LEAST_SECONDS, le=MOST_SECONDS, strict=False)]
# Clients write an object of a form as `expires_after[seconds]`; as JSON it is one field.
FIELDS = {
    "expires_after": {
        "type": "string",
        "description": 'deleted after so many seconds: {"anchor": "created_at", "seconds": N}',
    },
    "expires_after[anchor]": {"type": "string", "enum": ("created_at",)},
    "expires_after[seconds]": {
        "type": "integer",
        "minimum": LEAST_SECONDS,
        "maximum": MOST_SECONDS,
    },
}


class ExpiresAfter(RequestBody):
    """Says when a file is deleted, counted from its upload."""

    anchor: Literal["created_at"]
    seconds: Seconds


def seconds_of(fields: Mapping[str, str]) -> int | None:
    """Returns after how long a file is to be deleted; None where that is not asked for.

    Raises ApiError 400 for what says nothing of the kind.
    """
    given: Any = {
        name.removeprefix("expires_after[").removesuffix("]"): value
        for name, value in fields.items()
        if name.startswith("expires_after[")
    }
    if "expires_after" in fields:
        if given:
            raise ApiError(400, "expires_after comes twice; send it once", param="expires_after")
        try:
            given = json.loads(fields["expires_after"])
        except (ValueError, RecursionError) as error:
            raise ApiError(
                400, f"expires_after is not JSON: {error}", param="expires_after"
            ) from error
    elif not given:
        return None
    try:
        return ExpiresAfter.model_validate(given).seconds
    except ValidationError as error:
        wrong = invalid_body(error, given)
        path = "expires_after" if wrong.param is None else f"expires_after.{wrong.param}"
        raise ApiError(
            400, f"expires_after: {wrong.message}", param=path, code=wrong.code
        ) from None
