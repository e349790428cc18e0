"""What a caller may catch: every error that longctx raises on purpose.

A message says what, the limit and the cure. Bugs of our own are asserts, not these.
"""


class LongctxError(Exception):
    """Root of every error raised for callers."""


class ModelRefused(LongctxError):
    """The model folder cannot be served exactly; the message says why."""


class InvalidRequest(LongctxError):
    """The request is malformed or asks for what is not supported.

    `param` names the offending field, in the caller's words.
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextTooLong(InvalidRequest):
    """Prompt plus answer exceed the model's context or the KV pool."""


class DocumentMissing(LongctxError):
    """A request names a document that this engine has not opened."""


class Overloaded(LongctxError):
    """Too many requests wait already; try again later."""


class EngineDied(LongctxError):
    """The engine process ended while it held the request; it is being restarted."""


class BlocksLost(LongctxError):
    """Blocks that a running sequence needs are in no tier any more; it has to be computed again."""


class ConnectionLost(LongctxError):
    """The other end of a connection is gone, or was never there: nobody hears what is sent."""


class AuthenticationFailed(LongctxError):
    """The other end of a connection did not show in time that it knows the same secret."""


class PeerLost(LongctxError):
    """Another rank ended or hangs: what was shared with it is gone, and all ranks start again."""
