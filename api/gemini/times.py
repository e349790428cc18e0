"""Times and durations as Google writes them: RFC 3339 in UTC, and seconds with an `s`."""

import re
import time
from datetime import UTC, datetime

from longctx.errors import InvalidRequest

_DURATION = re.compile(r"([0-9]{1,11})(\.[0-9]{1,9})?s")
LATEST = 253_402_300_799  # the last second that RFC 3339 can write


def written(moment: float) -> str:
    """Returns a moment of `time.time` as RFC 3339 writes it, to the microsecond."""
    told = datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    return told.replace(".000000Z", "Z")


def expiry(ttl: str | None, expire_time: str | None) -> float | None:
    """Returns when something expires that lives so long or until then; None where neither is said.

    Raises InvalidRequest for both, for what is no time or duration, and for what is past.
    """
    if ttl is not None and expire_time is not None:
        raise InvalidRequest("ttl and expireTime exclude each other; send one", param="ttl")
    now = time.time()
    if ttl is not None:
        found = _DURATION.fullmatch(ttl)
        seconds = float(ttl[:-1]) if found else 0.0
        if not 0 < seconds <= LATEST - now:
            raise InvalidRequest(
                f'ttl={ttl[:64]!r} is no duration; send seconds from 0 on, such as "300s"',
                param="ttl",
            )
        return now + seconds
    if expire_time is None:
        return None
    try:
        moment = datetime.fromisoformat(expire_time)
        if moment.tzinfo is None:
            raise ValueError("no offset")
        end = moment.timestamp()
    except (ValueError, OverflowError):
        raise InvalidRequest(
            f"expireTime={expire_time[:64]!r} is no time of RFC 3339, such as 2030-01-31T12:00:00Z",
            param="expireTime",
        ) from None
    if end <= now:
        raise InvalidRequest(
            f"expireTime={expire_time!r} is past; it is {written(now)} now", param="expireTime"
        )
    return end
