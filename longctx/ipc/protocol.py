"""The messages between the HTTP process and the engine process: msgpack, never pickle.

`Channel` frames them. A command that expects an answer carries a ticket; the answer is the `Done`
with the same ticket. A session, with one rank or as rank 0 of many:

    engine                      HTTP process
    RankJoined (of many ranks)
                                Start
    Loading ...
    Loaded
                                Submit, OpenDocument, GetStats ... in any order
    Outputs, Done, Durable ...
                                Stop
"""

import os
from pathlib import Path
from typing import Any

import msgspec

from longctx.config import EngineConfig
from longctx.engine_info import EngineInfo
from longctx.engine_stats import EngineStats
from longctx.errors import (
    ContextTooLong,
    DocumentMissing,
    EngineDied,
    InvalidRequest,
    LongctxError,
    ModelRefused,
    Overloaded,
    PeerLost,
)
from longctx.request import Erasure, LevelVerdict, ModuleState, Piece, Request, RequestOutput
from offload.stats import Cleared
from prompt_cache.level import Level


class Message(msgspec.Struct, frozen=True, tag=True):
    """The base of all messages; a message is sent with the name of its class."""


class Fault(msgspec.Struct, frozen=True):
    """A `LongctxError` as a message can hold it."""

    kind: str
    message: str
    param: str | None = None

    @classmethod
    def of(cls, error: LongctxError) -> "Fault":
        """Return the fault that `error()` makes an equal error of."""
        param = error.param if isinstance(error, InvalidRequest) else None
        return cls(type(error).__name__, str(error), param)

    def error(self) -> LongctxError:
        """Return the error, of its own type if that is one of those that processes exchange."""
        kind = _FAULTS.get(self.kind, LongctxError)
        if issubclass(kind, InvalidRequest):
            return kind(self.message, param=self.param)
        return kind(self.message)


class RankJoined(Message, frozen=True):
    """The first message to the head of a rank that a launcher has started.

    `address`: where rank 0 listens for followers; followers leave it empty. `pid`: its process, for
    a server on the same machine to kill.
    """

    rank: int
    ranks: int
    pid: int
    address: str = ""


class LeaderAddress(Message, frozen=True):
    """The answer to a follower's `RankJoined`: where rank 0 listens, or why there is none."""

    address: str
    fault: Fault | None = None


class Start(Message, frozen=True):
    """Load the model: the first message to an engine with one rank, or the answer to rank 0."""

    config: EngineConfig
    model_folder: Path
    cache_dir: Path


class Submit(Message, frozen=True):
    """Run the request, as `Engine.submit`; it is answered by `Outputs` or `Rejected`."""

    request: Request


class Abort(Message, frozen=True):
    """End the request, as `Engine.abort`."""

    request_id: str


class OpenDocument(Message, frozen=True):
    """Make a document known, as `Engine.open_document`."""

    ticket: int
    document_id: str
    tokens: Path  # file of little-endian int32 token ids
    keep: Request | None = None


class CloseDocument(Message, frozen=True):
    """Forget a document, as `Engine.close_document`; return `Done.erasure`, `Erased` later."""

    ticket: int
    document_id: str


class OpenModule(Message, frozen=True):
    """Make a module known, as `Engine.open_module`."""

    ticket: int
    module_id: str
    pieces: tuple[Piece, ...]
    keep: Request | None = None
    sources: tuple[str, ...] = ()


class CloseModule(Message, frozen=True):
    """Forget a module, as `Engine.close_module`; return `Done.erasure`, `Erased` later."""

    ticket: int
    module_id: str


class GetModules(Message, frozen=True):
    """Return the states of those of these modules that are open, as `Done.modules`."""

    ticket: int
    module_ids: tuple[str, ...]


class JudgeLevel(Message, frozen=True):
    """Return the quality gate's verdict on a level of exactness, as `Done.level`."""

    ticket: int
    level: Level


class GetStats(Message, frozen=True):
    """Return the engine's counters and gauges, as `Done.stats`."""

    ticket: int


class Clear(Message, frozen=True):
    """Evict what is cached in these tiers and idle; return how much that was, as `Done.cleared`."""

    ticket: int
    tiers: tuple[str, ...]


class Stop(Message, frozen=True):
    """End the process; every request that still ran has been answered."""


class Loading(Message, frozen=True):
    """How far the loading is, where it takes long: `step` says it to people."""

    step: str


class Loaded(Message, frozen=True):
    """The answer to `Start`: what the engine has loaded, or why it cannot."""

    info: EngineInfo | None
    fault: Fault | None = None


class Rejected(Message, frozen=True):
    """The answer to a `Submit` that was refused: the request will have no outputs."""

    request_id: str
    fault: Fault


class Outputs(Message, frozen=True):
    """What one step of the engine has produced, for any of its requests."""

    outputs: list[RequestOutput]


class Durable(Message, frozen=True):
    """Durable token counts, by document id, of the documents whose count has changed."""

    documents: dict[str, int]


class Erased(Message, frozen=True):
    """What was erased of documents and modules, by id; their `Done.erasure` said that it waits."""

    erasures: dict[str, Erasure]


class Heartbeat(Message, frozen=True):
    """A sign of life: it shows that a rank which computes for long has not hung."""


class RanksLost(Message, frozen=True):
    """Tells why the ranks are about to end, to be started again by their launcher."""

    reason: str


class Done(Message, frozen=True):
    """The answer to the command with the same ticket: a fault, or the one field it asked for."""

    ticket: int
    fault: Fault | None = None
    stats: EngineStats | None = None
    cleared: dict[str, Cleared] | None = None  # by tier
    modules: dict[str, ModuleState] | None = None
    level: LevelVerdict | None = None
    erasure: Erasure | None = None


Command = (
    LeaderAddress
    | Start
    | Submit
    | Abort
    | OpenDocument
    | CloseDocument
    | OpenModule
    | CloseModule
    | GetModules
    | JudgeLevel
    | GetStats
    | Clear
    | Stop
)
Event = (
    RankJoined
    | Heartbeat
    | RanksLost
    | Loading
    | Loaded
    | Rejected
    | Outputs
    | Durable
    | Erased
    | Done
)

_FAULTS: dict[str, type[LongctxError]] = {
    kind.__name__: kind
    for kind in (
        ContextTooLong,
        DocumentMissing,
        EngineDied,
        InvalidRequest,
        ModelRefused,
        Overloaded,
        PeerLost,
    )
}


def encode_hook(value: Any) -> Any:
    """Encode, for msgspec, what a message may hold beside plain types: paths.

    They are sent as bytes, as the system has them: they need not be UTF-8.
    """
    if isinstance(value, Path):
        return os.fsencode(value)
    raise TypeError(f"{type(value).__name__} cannot be sent")


def decode_hook(kind: type, value: Any) -> Any:
    """Decode, for msgspec, what `encode_hook` has encoded."""
    if issubclass(kind, Path):
        return kind(os.fsdecode(value))
    raise TypeError(f"{kind.__name__} cannot be received")


_ENCODER = msgspec.msgpack.Encoder(enc_hook=encode_hook)
_COMMANDS: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command, dec_hook=decode_hook)
_EVENTS: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event, dec_hook=decode_hook)


def encode(message: Command | Event) -> bytes:
    """Return the message as the body of a frame."""
    return _ENCODER.encode(message)


def decode_command(body: bytes) -> Command:
    """Return the command that `encode` made `body` of."""
    return _COMMANDS.decode(body)


def decode_event(body: bytes) -> Event:
    """Return the event that `encode` made `body` of."""
    return _EVENTS.decode(body)
