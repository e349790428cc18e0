"""Answers a client for as long as it is there: server-sent events with pings, and whole answers.

Both kinds watch the connection. When the client goes away the work is cancelled, which closes the
engine's iterator, which aborts the request.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api.http.errors import ApiError, api_error, logger

Result = TypeVar("Result")
JSONObject: TypeAlias = dict[str, Any]

PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"


def encode_event(data: JSONObject) -> bytes:
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


def encode_named_event(data: JSONObject) -> bytes:
    """Encodes an event that is called by its own `type`."""
    return f"event: {data['type']}\n".encode() + encode_event(data)


@dataclass(frozen=True, slots=True)
class EventForm:
    """Says how the events of an API are written: each of them, a ping, the end, and an error that
    comes when the stream has begun."""

    encode: Callable[[JSONObject], bytes] = encode_event
    ping: bytes = PING
    last: bytes = DONE
    failure: Callable[[ApiError], JSONObject] = lambda error: error.body
    media_type: str = "text/event-stream"


OPENAI_EVENTS = EventForm()


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Returns what `work` returns. When the client leaves, cancels it and raises ClientDisconnect.

    The request's body must have been read.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnect(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        await _cancel(task, gone)


class EventStream(Response):
    """Sends each dict of a generator as an event, pings while there is none, and the end last.

    Dicts that come in one list are sent in one piece: each piece is the work of several events.

    Headers go out with the first event or ping, so a request that fails at once is still answered
    with a status; a later failure is an event with the error's body.
    """

    def __init__(
        self,
        events: AsyncGenerator[JSONObject | list[JSONObject], None],
        *,
        ping_seconds: float,
        form: EventForm = OPENAI_EVENTS,
    ) -> None:
        super().__init__(
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
            media_type=form.media_type,
        )
        del self.headers["content-length"]
        self.events = events
        self.form = form
        self.ping_seconds = ping_seconds
        self.started = False
        self.last_sent = 0.0
        self.writing = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.last_sent = asyncio.get_running_loop().time()
        pump = asyncio.create_task(self._pump(send))
        gone = asyncio.create_task(_disconnect(receive))
        pings = asyncio.create_task(self._ping(send))
        try:
            await asyncio.wait({pump, gone}, return_when=asyncio.FIRST_COMPLETED)
            if pump.done():
                pump.result()
        finally:
            await _cancel(pump, gone, pings)
        if pump.done() and not pump.cancelled() and (self.started or self.form.last):
            await self._write(send, self.form.last, is_last=True)

    async def _pump(self, send: Send) -> None:
        async with aclosing(self.events) as events:
            try:
                async for event in events:
                    together = event if isinstance(event, list) else [event]
                    await self._write(send, b"".join(map(self.form.encode, together)))
            except Exception as error:
                if not self.started:
                    raise
                failure = api_error(error)
                if failure is not error and failure.status == 500:
                    logger.exception("a stream failed")
                await self._write(send, self.form.encode(self.form.failure(failure)))

    async def _ping(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        while True:
            silent = loop.time() - self.last_sent
            if silent >= self.ping_seconds:
                await self._write(send, self.form.ping)
            else:
                await asyncio.sleep(self.ping_seconds - silent)

    async def _write(self, send: Send, data: bytes, *, is_last: bool = False) -> None:
        async with self.writing:  # an event and a ping must not overtake the headers
            self.last_sent = asyncio.get_running_loop().time()
            if not self.started:
                self.started = True
                headers = self.raw_headers
                await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": data, "more_body": not is_last})


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    """Ends the tasks and waits for them: generators are closed when this returns."""
    for task in tasks:
        task.cancel()
    for task in tasks:
        with suppress(asyncio.CancelledError, Exception):
            await task
