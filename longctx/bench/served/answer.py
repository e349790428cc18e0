"""A streamed chat completion as its client sees it: its text, and when it came."""

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from longctx.errors import LongctxError


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer; token counts are None where the server tells none."""

    text: str
    first_token_seconds: float  # until its first text, or its end where it has none
    seconds: float
    prompt_tokens: int | None
    cached_tokens: int | None


def streaming(model: str, content: str | Sequence[dict[str, Any]], max_tokens: int) -> bytes:
    """Return the body of a request for a greedy answer to one message of the user."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps(body).encode()


def read_answer(lines: Iterable[bytes], began: float) -> Answer:
    """Read server-sent events to their end; `began` is the `perf_counter` of the request.

    Raises LongctxError where the server ends the answer by an error.
    """
    text: list[str] = []
    first: float | None = None
    usage: dict[str, Any] = {}
    for line in lines:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line.removeprefix(b"data: "))
        if "error" in event:
            raise LongctxError(f"the server answered {event['error']}")
        usage = event.get("usage") or usage
        for choice in event.get("choices", ()):
            piece = choice.get("delta", {}).get("content")
            if piece:
                first = first or time.perf_counter() - began
                text.append(piece)
    seconds = time.perf_counter() - began
    return Answer(
        text="".join(text),
        first_token_seconds=seconds if first is None else first,
        seconds=seconds,
        prompt_tokens=usage.get("prompt_tokens"),
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens"),
    )
