"""Streams of every API: what fails after a ping and before the first event is told as an event."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

import api.anthropic.routes
import api.gemini.answers
import api.responses.routes
from api.http.errors import ApiError
from api.http.sse import OPENAI_EVENTS, EventForm, EventStream

FORMS = {
    "openai": OPENAI_EVENTS,
    "responses": api.responses.routes.EVENTS,
    "anthropic": api.anthropic.routes.EVENTS,
    "gemini": api.gemini.answers.EVENTS,
}


@pytest.mark.parametrize("name", FORMS)
def test_a_failure_after_a_ping_is_an_event(name: str) -> None:
    sent = asyncio.run(_sent(FORMS[name]))
    assert sent[0]["status"] == 200
    *_, said, last = (each["body"] for each in sent[1:])
    assert b"the PDF is broken" in said and not sent[-1]["more_body"]
    assert last == FORMS[name].last
    if name == "responses":
        assert said.startswith(b"event: error\n") and b'"param":"input"' in said


async def _sent(form: EventForm) -> list[dict[str, Any]]:
    """Send a stream that fails once something was sent; return the messages of the server."""
    sent: list[dict[str, Any]] = []
    pinged = asyncio.Event()

    async def events() -> AsyncGenerator[dict[str, Any], None]:
        await pinged.wait()
        raise ApiError(400, "the PDF is broken", param="messages")
        yield {}

    async def send(message: Any) -> None:
        sent.append(message)
        if message["type"] == "http.response.body":
            pinged.set()

    async def receive() -> Any:
        await asyncio.Event().wait()

    await EventStream(events(), ping_seconds=0.01, form=form)({"type": "http"}, receive, send)
    return sent
