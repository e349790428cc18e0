"""The log as lines of JSON, with one line for each request.

A line of a request has what it took and counted, and nothing of what was asked or answered.
"""

import json
import logging
import sys
import uuid
from datetime import UTC, datetime
from typing import Any, TextIO

from api.http.observing import Handled

logger = logging.getLogger("longctx.requests")


class JSONFormatter(logging.Formatter):
    """Writes a record as one line of JSON, with the fields of a request where it has them."""

    def format(self, record: logging.LogRecord) -> str:
        told: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return json.dumps(told, ensure_ascii=False, default=str)


def log_as_json(stream: TextIO | None = None) -> None:
    """Writes all that this process logs from now on as JSON, to stderr unless told otherwise."""
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(JSONFormatter())
    logging.getLogger().addHandler(handler)
    logger.setLevel(logging.INFO)


def log_request(handled: Handled) -> None:
    """Writes the line of a request."""
    account = handled.account
    fields: dict[str, Any] = {
        "id": account.asked[0].request_id if account.asked else uuid.uuid4().hex,
        "tenant": handled.tenant,
        "method": handled.method,
        "route": handled.route,
        "status": handled.status,
        "total_ms": _ms(handled.ended - handled.began),
    }
    if account.asked:
        prompt, cached, completion = account.usage
        first = account.first_token
        reasons = list(dict.fromkeys(asked.finish_reason.value for asked in account.asked))
        fields |= {
            "prompt_tokens": prompt,
            "cached_tokens": cached,
            "prompt_tokens_by_source": account.tokens_by_source,
            "completion_tokens": completion,
            "ttft_ms": None if first is None else _ms(first - handled.began),
            "finish_reason": reasons[0] if len(reasons) == 1 else reasons,
        }
    logger.info("%s %s", handled.method, handled.route, extra={"fields": fields})


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 1)
