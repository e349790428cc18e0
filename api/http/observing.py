"""Tells observers of every request once its answer has been sent: the log, and traces."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.http.account import Account, open_account
from api.http.auth import SINGLE_TENANT


@dataclass(slots=True)
class Handled:
    """A request that was answered, or whose client left. Moments are those of `perf_counter`."""

    connection: HTTPConnection
    account: Account
    began: float = field(default_factory=time.perf_counter)
    began_ns: int = field(default_factory=time.time_ns)  # the same moment, since 1970
    ended: float = 0.0
    status: int = 500  # where nothing is sent: an exception that nobody expected

    @property
    def method(self) -> str:
        return str(self.connection.scope["method"])

    @property
    def route(self) -> str | None:
        """The path of the route as it is declared; None where there is none."""
        return getattr(self.connection.scope.get("route"), "path", None)

    @property
    def tenant(self) -> str:
        """The beginning of the tenant's name, which is a hash of its key; empty without keys."""
        return str(self.connection.scope.get("longctx.tenant", SINGLE_TENANT))[:12]

    def nanoseconds(self, moment: float) -> int:
        """Returns a moment in nanoseconds since 1970."""
        return self.began_ns + round(1e9 * (moment - self.began))


Observer: TypeAlias = Callable[[Handled], None]


class Observing:
    """ASGI middleware: keeps the account of each request, and tells the observers of it."""

    def __init__(self, app: ASGIApp, *, observers: Sequence[Observer]) -> None:
        self.app = app
        self.observers = observers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        handled = Handled(HTTPConnection(scope), open_account())

        async def watch(message: Message) -> None:
            if message["type"] == "http.response.start":
                handled.status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watch)
        finally:
            handled.ended = time.perf_counter()
            for observer in self.observers:
                observer(handled)
